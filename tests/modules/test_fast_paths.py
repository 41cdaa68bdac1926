"""Whole runs by the faster paths and by the plain ones end in the same weights, and each flag does what it says."""

import pytest
import torch

from lightning_rlhf.modules import (
    GRPOModule,
    OnlineDPOModule,
    PPOModule,
    PreferenceModule,
    RewardModule,
    RFTModule,
    SFTModule,
)
from lightning_rlhf.modules.fused_layers import FusedNorm
from lightning_rlhf.modules.reading import FastPaths, fast_paths

FLAGS = ("padding_free", "fused_logprobs", "fused_layers", "fused_optimizer")
PLAIN = dict.fromkeys(FLAGS, False)
ROWS = ([1, 2, 3, 0], [4, 5, 0], [6, 7, 1, 2, 3, 0], [5, 0], [3, 3, 7, 0], [2, 6, 0])


def pairs() -> dict[str, torch.Tensor]:
    """Three pairs of completions of unequal length, each after its first token."""
    width = max(map(len, ROWS)) + 1
    ids = torch.tensor([row + [0] * (width - len(row)) for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ROWS])
    counts = mask.bool().clone()
    counts[:, 0] = False
    return {"input_ids": ids, "attention_mask": mask, "loss_mask": counts, "margin": torch.zeros(3)}


ON_POLICY = {
    "ppo": (PPOModule, {"entropy_coef": 0.1}),
    "ppo with a minimum length": (PPOModule, {"min_new_tokens": 2, "temperature": 0.8, "bootstrap_truncated": True}),
    "ppo with lora": (PPOModule, {"lora_r": 4, "gradient_checkpointing": True, "learning_rate": 0.05}),
    "grpo": (GRPOModule, {"group_size": 3, "entropy_coef": 0.05}),
    "rft": (RFTModule, {"group_size": 3, "minibatch_size": 1}),
    "online dpo": (OnlineDPOModule, {"group_size": 3}),
}
OFFLINE = {"sft": SFTModule, "dpo": PreferenceModule, "reward": RewardModule}


def weights(module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_runs_end_in_the_same_weights(short, fit, reward_folder, name):
    kind, options = ON_POLICY[name]
    # SGD-like steps: where a gradient is rounding, Adam's first steps would have its sign alone.
    options = {"reward": reward_folder, "adam_eps": 1.0, "learning_rate": 0.1} | options
    runs = {}
    for fast in (True, False):
        torch.manual_seed(0)  # of new adapters
        flags = {} if fast else PLAIN | {"compact_rollouts": False}
        module = fit(short(kind)(**options, **flags), max_epochs=2)
        assert fast_paths(module.policy) == FastPaths(fast, fast)
        runs[fast] = weights(module), module.samples
    assert runs[True][1]["response"] == runs[False][1]["response"]
    assert_same(runs[True][0], runs[False][0])


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_runs_end_in_the_same_weights(policy, fit, name):
    runs = []
    for flags in ({}, PLAIN):
        torch.manual_seed(0)
        module = OFFLINE[name](policy, adam_eps=1.0, learning_rate=0.5, **flags)
        runs.append(weights(fit(module, [pairs()] * 3)))
    assert_same(*runs)


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_switches_its_path_alone(policy, fit, flag):
    module = fit(SFTModule(policy, **{flag: False}), [pairs()])
    found = fast_paths(module.network)
    optimizer = module.trainer.optimizers[0]
    has_fused_layers = any(isinstance(m, FusedNorm) for m in module.network.modules())
    seen = dict(zip(FLAGS, (*found, has_fused_layers, optimizer.defaults["fused"]), strict=True))
    assert seen == dict.fromkeys(FLAGS, True) | {flag: False}


@pytest.mark.parametrize("compact", [True, False])
def test_compact_rollouts_is_a_flag(short, new_prompts, compact):
    module = short(PPOModule)(compact_rollouts=compact)
    module.configure_model()
    module._seed = 1
    rows = []
    embedding = module.policy.get_input_embeddings()
    embedding.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    module.roll_out(new_prompts().batch(["\1\2"] * 4), range(4))
    assert rows[0] == (1 if compact else 4)


def test_reward_models_are_read_without_padding_too(short, fit, reward_folder):
    for flag in (True, False):
        module = fit(short(PPOModule)(reward=reward_folder, padding_free=flag))
        (term,) = module.rewards.terms.values()
        assert fast_paths(term._scorer.model) == FastPaths(flag, False)
