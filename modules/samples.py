"""Sampled responses with their scores: put together from several rollouts or ranks, and chosen from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ..ranks import of_all_ranks
from .rollout import Rollout
from .scoring import Scores


class Samples(NamedTuple):
    """Scored responses; rows of one prompt stand next to each other."""

    prompts: list[str]
    responses: list[str]
    rollout: Rollout
    scores: Scores


def repeated(prompts: dict[str, Any], times: int) -> dict[str, Any]:
    """A batch of prompts with each of them so many times in a row."""
    rows = [row for row in range(len(prompts["prompts"])) for _ in range(times)]
    return {name: chosen(value, rows) for name, value in prompts.items()}


def chosen(value: Any, rows: Sequence[int]) -> Any:
    """Some rows of samples, or of anything that is made of tensors and lists of one length."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value[list(rows)]
    if isinstance(value, dict):
        return {name: chosen(column, rows) for name, column in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(chosen(field, rows) for field in value))
    return [value[row] for row in rows]


def joined(parts: Sequence[Samples]) -> Samples:
    """Samples one after the other; prompts are padded on the left to the longest."""
    longest = max(part.rollout.prompt_ids.shape[1] for part in parts)
    return _joined([part._replace(rollout=_widened(part.rollout, longest)) for part in parts])


def of_ranks(samples: Samples) -> Samples:
    """The samples of all ranks, in order of rank, on every rank; all must call it."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return samples
    device = samples.rollout.prompt_ids.device
    return _moved(joined(of_all_ranks(_moved(samples, torch.device("cpu")))), device)


def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, dict):
        return {name: _joined([value[name] for value in values]) for name in first}
    if isinstance(first, tuple):
        return type(first)(*map(_joined, zip(*values, strict=True)))
    return [item for value in values for item in value]


def _widened(rollout: Rollout, length: int) -> Rollout:
    missing = length - rollout.prompt_ids.shape[1]
    return rollout._replace(
        prompt_ids=pad(rollout.prompt_ids, (missing, 0)), prompt_mask=pad(rollout.prompt_mask, (missing, 0))
    )


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(column, device) for name, column in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(_moved(field, device) for field in value))
    return value
