"""The data of one on-policy iteration, and the fixed-length data set through which Lightning's loop reads it."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from ..loaders import EvenBatches, ResumableLoader
from .rollout import trimmed


class Experience(NamedTuple):
    """What an update needs of a rollout. All tensors share dimension 0; [B, T] ones follow the response tokens."""

    prompt_ids: Tensor
    """(B, P), left-padded."""
    prompt_mask: Tensor
    """(B, P) bool."""
    response_ids: Tensor
    """(B, T), right-padded."""
    response_mask: Tensor
    """(B, T) bool, True from the first response token to the EOS, inclusive."""
    logprobs: Tensor
    """(B, T), log pi_old(token t | all before it)."""
    values: Tensor
    """(B, T), V before token t."""
    advantages: Tensor
    """(B, T)."""
    returns: Tensor
    """(B, T)."""


class TokenStatistics(NamedTuple):
    """What the policy and the reference say of sampled responses; float32, (B, T) and 0 outside the mask."""

    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    value_after: Tensor
    """(B,), the value after the last response token."""


def of_all_ranks(experience: Experience) -> Experience:
    """The experience of all ranks, in order of rank; all must call it."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return experience
    widest = torch.tensor(experience.prompt_ids.shape[1], device=experience.prompt_ids.device)
    dist.all_reduce(widest, dist.ReduceOp.MAX)
    missing = int(widest) - experience.prompt_ids.shape[1]
    padded = {name: pad(getattr(experience, name), (missing, 0)) for name in ("prompt_ids", "prompt_mask")}
    return Experience(*map(_gathered, experience._replace(**padded)))


def _gathered(rows: Tensor) -> Tensor:
    of_ranks = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, rows.contiguous())
    return torch.cat(of_ranks)


class ExperienceDataset(Dataset):
    """A map-style data set of fixed length whose content is replaced at the start of every epoch.

    It holds the experience of all ranks: minibatches are drawn from all of it, so that which sequences meet in one
    optimizer step does not depend on the number of ranks, and any rank's checkpoint has the whole.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.experience: Experience | None = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, rows: list[int]) -> Experience:
        """One minibatch at once: one expression over all fields."""
        return trimmed(Experience(*(field[rows] for field in self.experience)))


def experience_loader(
    dataset: ExperienceDataset, batch_size: int, passes: int, seed: int, world_size: int, rank: int
) -> ResumableLoader:
    """Minibatches of K shuffled passes: this rank's share of each step."""
    batches = EvenBatches(len(dataset), batch_size, world_size, rank, shuffle=True, seed=seed, passes=passes)
    return ResumableLoader(dataset, batches, collate_fn=_as_it_is)


def _as_it_is(minibatch: Experience) -> Experience:
    return minibatch
