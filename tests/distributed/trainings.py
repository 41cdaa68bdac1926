"""Short trainings of every module, the same on one process and on two; as a script, one of several processes.

python trainings.py TASKS.json OUT     for each task, the arguments of `run`; the results go to OUT.<rank>
"""

import json
import sys
from functools import partial
from pathlib import Path

import lightning as L
import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_llama, make_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from lightning_rlhf.callbacks import RNGState
from lightning_rlhf.checkpointing import AtomicCheckpointIO
from lightning_rlhf.datamodules import (
    PreferenceDataModule,
    PromptDataModule,
    RankingDataModule,
    RatingDataModule,
    SFTDataModule,
    UnpairedDataModule,
)
from lightning_rlhf.modules import (
    GRPOModule,
    KTOModule,
    OnlineDPOModule,
    PPOModule,
    PreferenceModule,
    RewardModule,
    RFTModule,
    SFTModule,
    backbone,
    scorer,
)
from lightning_rlhf.modules.compositions import TokenMean, WhitenedGroupScores
from lightning_rlhf.modules.objectives import IPO
from lightning_rlhf.modules.reward_objectives import OrdinalRatings
from lightning_rlhf.modules.sharding import whole_state
from lightning_rlhf.pretrained import resolve
from lightning_rlhf.strategies import FSDP2Strategy

TEXTS = ("\1\2\3\4\5\6\7\1\2", "\2", "\3\3\3", "\4\1", "\5\6\7\1", "\6\6", "\7\1\2\3\4\5", "\1\1", "\2\4\6", "\3\5")
TEXTS += ("\4\4\5\5", "\1\7")
# With a large ε an update is smooth in its gradient: without, the sign of a gradient of 1e-9 would be a step of 0.1.
STEPS = dict(learning_rate=0.1, adam_eps=0.1, lr_scheduler="linear")


def letters(prompts, responses, **columns):
    """Every letter has its own worth."""
    return [sum((ord(c) * 7 % 5) - 1.5 for c in response) / 2 for response in responses]


def has_a_1(prompts, responses, **columns):
    """One of two values, so that responses to one prompt often tie."""
    return [float("\1" in response) for response in responses]


def on_policy(kind: type, folder: Path, ranks: int, micro: int = 4, rollout: int = 8, **options) -> tuple:
    module = kind(
        str(folder / "policy"),
        options.pop("reward", letters),
        rollout_batch_size=rollout // ranks,
        minibatch_size=micro // ranks,
        max_new_tokens=5,
        num_passes=2,
        **(STEPS | options),
    )
    data = PromptDataModule(Dataset.from_dict({"prompt": TEXTS}), val_data=Dataset.from_dict({"prompt": TEXTS[:5]}))
    return module, data


ppo = partial(on_policy, PPOModule)
ALL_GLOBAL = dict(whiten_rewards=True, normalize_scores=True, kl_target=0.5, kl_horizon=20, bootstrap_truncated=True)


def sft(folder: Path, ranks: int, micro: int = 4, rows: int = 12, **options) -> tuple:
    texts = Dataset.from_dict({"text": TEXTS[:rows]})
    return SFTModule(str(folder / "policy"), **STEPS, **options), SFTDataModule(
        texts, val_data=texts.select(range(5)), batch_size=micro // ranks
    )


def preferences(folder: Path, ranks: int, micro: int = 4) -> tuple:
    rows = [{"prompt": "\1", "chosen": a, "rejected": b} for a, b in zip(TEXTS, reversed(TEXTS), strict=True)]
    data = Dataset.from_list(rows)
    return RewardModule(str(folder / "reward"), **STEPS), PreferenceDataModule(
        data, val_data=data.select(range(5)), batch_size=micro // ranks
    )


def dpo(folder: Path, ranks: int, micro: int = 4, **options) -> tuple:
    _, data = preferences(folder, ranks, micro)
    return PreferenceModule(str(folder / "policy"), **STEPS, **options), data


def kto(folder: Path, ranks: int, micro: int = 4, **options) -> tuple:
    texts = enumerate(zip(TEXTS, reversed(TEXTS), strict=True))
    rows = [{"prompt": p, "completion": c, "label": i % 3 > 0} for i, (p, c) in texts]
    data, size = Dataset.from_list(rows), 4 // ranks
    return KTOModule(str(folder / "policy"), **STEPS, **options), UnpairedDataModule(
        data, val_data=data.select(range(5)), batch_size=micro // ranks, val_batch_size=size
    )


def rankings(folder: Path, ranks: int, micro: int = 4) -> tuple:
    rows = [{"prompt": text, "responses": ["\1\2", "\3", "\4\5\6"][: 2 + i % 2]} for i, text in enumerate(TEXTS)]
    data = Dataset.from_list(rows)
    return RewardModule(str(folder / "reward"), **STEPS), RankingDataModule(
        data, val_data=data.select(range(5)), batch_size=micro // ranks
    )


def ratings(folder: Path, ranks: int, micro: int = 4, **options) -> tuple:
    data = Dataset.from_list([{"text": text, "ratings": [len(text), i % 3]} for i, text in enumerate(TEXTS[:8])])
    return RewardModule(str(folder / "reward"), **STEPS, **options), RatingDataModule(
        data, val_data=data.select(range(5)), batch_size=micro // ranks
    )


RUNS = {
    "ppo": lambda *a, **k: ppo(*a, **k, **ALL_GLOBAL),
    "ppo_lora": lambda *a, **k: ppo(*a, **k, lora_r=2, target_kl=0.01),
    "ppo_value_model": lambda folder, *a, **k: ppo(
        folder, *a, **k, value_model=str(folder / "reward"), reward=[str(folder / "reward"), letters]
    ),
    "grpo": lambda *a, **k: on_policy(
        GRPOModule, *a, **k, group_size=2, kl_coef=0.2, kl_target=0.5, kl_horizon=20, normalize_scores=True
    ),
    "grpo_dynamic": lambda *a, **k: on_policy(
        GRPOModule,
        *a,
        **k,
        group_size=2,
        reward=has_a_1,
        max_sampling_rounds=3,
        kl_in="reward",
        advantage=WhitenedGroupScores(),
        aggregation=TokenMean(),
    ),
    "rft": lambda *a, **k: on_policy(RFTModule, *a, **k, rollout=16, group_size=2, from_reference=True),
    "online_dpo": lambda *a, **k: on_policy(
        OnlineDPOModule, *a, **k, rollout=16, group_size=4, label_temperature=1.0, normalize_scores=True
    ),
    "sft": sft,
    "sft_uneven": lambda *a, **k: sft(*a, **k, rows=9),
    "sft_lora": lambda *a, **k: sft(*a, **k, lora_r=2),
    "preferences": preferences,
    "dpo": dpo,
    "dpo_lora": lambda *a, **k: dpo(*a, **k, lora_r=2, objective=IPO(0.5), label_smoothing=0.1),
    "kto": kto,
    "ratings": ratings,
    "rankings": rankings,
    "ordinal": lambda *a, **k: ratings(*a, **k, objective=OrdinalRatings([*range(10)], learning_rate=0.2)),
}


# A clipped gradient hides a wrong scale, so not all are. These are: unclipped, they blow rounding up, at such a rate.
CLIPPED = ("ppo", "ppo_lora", "grpo", "grpo_dynamic", "sft_lora", "preferences", "dpo_lora")


def make_models(folder: Path) -> None:
    """A language model of eight tokens, and a reward model."""
    make_llama(vocab_size=8).save_pretrained(folder / "policy")
    config = LlamaConfig(**make_llama(vocab_size=8).config.to_dict() | {"num_labels": 1})
    config.reward_mean, config.reward_std = 0.75, 2.5
    with torch.random.fork_rng():
        torch.manual_seed(5)
        LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        make_tokenizer().save_pretrained(folder / name)


class SaveAt(L.Callback):
    """Write a checkpoint behind an optimizer step, wherever in an epoch that is."""

    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


READ: list[str] = []  # models whose weights this process read


def _resolve(spec: str) -> str:
    READ.append(spec)
    return resolve(spec)


backbone.resolve = scorer.resolve = _resolve


def strategy_of(name: str) -> object:
    """A strategy by its name here."""
    if name == "in_step":
        return FSDP2Strategy(unshard_rollouts=False)
    return FSDP2Strategy(save_distributed_checkpoint=True) if name == "folder" else name


def run(
    name: str,
    folder: Path,
    strategy: str = "auto",
    ranks: int = 1,
    accumulate: int = 1,
    save: tuple[int, str] | None = None,
    resume: str | None = None,
    export: str | None = None,
    **trainer_options,
) -> dict:
    """Parameters, metrics and samples at the end of a training of three epochs."""
    L.seed_everything(3, verbose=False)
    READ.clear()
    module, data = RUNS[name](folder, ranks, micro=4 // accumulate)
    trainer = L.Trainer(
        **dict(
            max_epochs=3,
            accelerator="cpu",
            devices=ranks,
            strategy=strategy_of(strategy),
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.5 if name in CLIPPED else None,
            plugins=[AtomicCheckpointIO()],
            callbacks=[RNGState(), *([SaveAt(*save)] if save else [])],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        | trainer_options
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    if export:
        module.save_pretrained(export)
    return {
        "parameters": whole_state(module),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "samples": getattr(module, "samples", {}),
        "read": len(READ),
    }


if __name__ == "__main__":
    tasks, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results = {key: run(folder=out.parent, ranks=2, **task) for key, task in tasks.items()}
    torch.save(results, f"{out}.{torch.distributed.get_rank()}")
