"""Seconds of each phase of one PPO iteration, on the models that `make demo` leaves behind.

python benchmarks/phases.py --model runs/demo/sft/model --reward runs/demo/reward/model
"""

import argparse

import torch
from meters import median_seconds

from lightning_rlhf.loaders import generator_for
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.modules.packed_weights import packed_weights
from lightning_rlhf.modules.ppo import PPOExperience
from lightning_rlhf.modules.rollout import Rollout, sample, texts, trimmed
from lightning_rlhf.modules.scoring import Responses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/sft/model")
    parser.add_argument("--reward", default="runs/demo/reward/model")
    parser.add_argument("--responses", type=int, default=48)
    parser.add_argument("--minibatch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=18)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()

    module = PPOModule(
        args.model, args.reward, dtype="bfloat16", lora_r=16, lora_last_layers=16, max_new_tokens=args.new_tokens
    )
    module.configure_model()
    prompts = torch.randint(100, 20_000, (args.responses, 6), generator=generator_for(0))

    def roll_out() -> Rollout:
        with packed_weights(module.policy, len(prompts)):
            return sample(module.policy, prompts, torch.ones_like(prompts), module.sampling, generator_for(1))

    rollout = roll_out()
    with torch.no_grad():
        stats = module.token_statistics(rollout)
    rows = PPOExperience(*rollout[:4], stats.logprobs, stats.values, stats.values + 1, stats.values + 1)
    minibatch = trimmed(PPOExperience(*(field[: args.minibatch] for field in rows)))

    def update() -> None:
        said = module.read(module.policy, minibatch)
        loss = said.logprobs.sum() + module.values(minibatch, said.hidden).sum()
        loss.backward()

    phases = {
        f"sample {args.responses} responses": roll_out,
        "policy and reference log-probabilities": torch.no_grad()(lambda: module.token_statistics(rollout)),
        "reward model": lambda: module.rewards(Responses([""] * args.responses, texts(rollout, module.tokenizer))),
        f"forward and backward of {args.minibatch} responses": update,
    }
    for name, phase in phases.items():
        print(f"{median_seconds(phase, args.repetitions):6.2f} s  {name}", flush=True)


if __name__ == "__main__":
    main()
