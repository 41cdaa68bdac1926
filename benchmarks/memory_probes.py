"""Bytes that one forward pass of PPO or SFT leaves for its backward pass, and of a rollout's keys and values."""

from pathlib import Path

import torch
from memory_model import activations, saved_logits
from meters import saved_for_backward, size
from model_shapes import Run
from small_llama import make_module
from torch import Tensor, nn

from lightning_rlhf.modules import PPOModule
from lightning_rlhf.modules.ppo import PPOExperience
from lightning_rlhf.modules.rollout import Sampling, sample


def saved_formula(run: Run) -> int:
    """What `saved_bytes` should find."""
    return activations(run) + saved_logits(run)


def saved_bytes(run: Run, folder: Path) -> int:
    """Of the forward pass of a micro-batch in which every token counts."""
    module = make_module(run, folder)
    module.configure_model()
    if run.method == "sft":
        batch = text_batch(run)
        return saved_for_backward([module.network], lambda: _autocast(run, lambda: module(batch)))
    batch = minibatch(run)
    return saved_for_backward([module.policy, module.value], lambda: _autocast(run, lambda: _losses(module, batch)))


def cache_bytes(run: Run, folder: Path) -> int:
    """Of the keys and values after the last token of a rollout, none of which ends before."""
    module = make_module(run, folder)
    module.configure_model()
    caches = []
    module.policy.register_forward_hook(lambda network, args, out: caches.append(out.past_key_values))
    ids, mask = _prompts(run, run.rollout_batch_size)
    sampling = Sampling(run.response, eos_token_ids=(), pad_token_id=0)
    with torch.no_grad():
        _autocast(
            run, lambda: sample(module.policy, ids, mask, sampling, torch.Generator().manual_seed(0), compact=False)
        )
    return size(tensor for layer in caches[-1].layers for tensor in (layer.keys, layer.values))


def minibatch(run: Run) -> PPOExperience:
    """B rows of P + T random tokens; with padding, one prompt lacks a token."""
    ids, mask = _prompts(run, run.batch)
    responses, numbers = _ids(run, run.batch, run.response), torch.zeros(run.batch, run.response)
    return PPOExperience(ids, mask, responses, torch.ones_like(numbers).bool(), *[numbers] * 4)


def text_batch(run: Run) -> dict[str, Tensor]:
    """B texts of P + T random tokens, T of which count; with padding, one lacks a token."""
    ids, mask = _ids(run, run.batch, run.length), torch.ones(run.batch, run.length, dtype=torch.long)
    mask[0, 0] = not run.padded
    counts = torch.arange(run.length).expand_as(ids) >= run.prompt
    return {"input_ids": ids, "attention_mask": mask, "loss_mask": counts}


def _prompts(run: Run, rows: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(rows, run.prompt, dtype=torch.bool)
    mask[0, 0] = not run.padded
    return _ids(run, rows, run.prompt), mask


def _ids(run: Run, *shape: int) -> Tensor:
    return torch.randint(1, run.shape.vocabulary, shape, generator=torch.Generator().manual_seed(0))


def _losses(module: PPOModule, batch: PPOExperience) -> tuple[Tensor, Tensor]:
    said = module.read(module.policy, batch)
    return said.logprobs, module.values(batch, said.hidden)[:, :-1]


def _autocast(run: Run, function: nn.Module) -> object:
    with torch.autocast("cpu", torch.bfloat16, enabled=run.mixed, cache_enabled=False):  # as Lightning does
        return function()
