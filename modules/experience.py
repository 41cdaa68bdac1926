"""The data of one on-policy iteration, and the fixed-length data set through which Lightning's loop reads it."""

from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from ..loaders import EvenBatches, ResumableLoader
from .rollout import trimmed


class Experience(NamedTuple):
    """What an update needs of a rollout. All tensors share dimension 0; [B, T] ones follow the response tokens.

    Each method has its own: this one's fields, then what else its loss reads.
    """

    prompt_ids: Tensor
    """(B, P), left-padded."""
    prompt_mask: Tensor
    """(B, P) bool."""
    response_ids: Tensor
    """(B, T), right-padded."""
    response_mask: Tensor
    """(B, T) bool, True from the first response token to the EOS, inclusive."""


class TokenStatistics(NamedTuple):
    """What the policy and the reference say of sampled responses; float32, (B, T) and 0 outside the mask."""

    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    value_after: Tensor
    """(B,), the value after the last response token."""


Fields = TypeVar("Fields", bound=NamedTuple)


def of_all_ranks(experience: Fields) -> Fields:
    """The experience of all ranks, in order of rank; all must call it."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return experience
    widest = torch.tensor(experience.prompt_ids.shape[1], device=experience.prompt_ids.device)
    dist.all_reduce(widest, dist.ReduceOp.MAX)
    missing = int(widest) - experience.prompt_ids.shape[1]
    padded = {name: pad(getattr(experience, name), (missing, 0)) for name in ("prompt_ids", "prompt_mask")}
    return type(experience)(*map(_gathered, experience._replace(**padded)))


def _gathered(rows: Tensor) -> Tensor:
    of_ranks = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, rows.contiguous())
    return torch.cat(of_ranks)


class ExperienceDataset(Dataset):
    """A map-style data set of fixed length whose content is replaced at the start of every epoch.

    It holds the experience of all ranks: minibatches are drawn from all of it, so that which sequences meet in one
    optimizer step does not depend on the number of ranks, and any rank's checkpoint has the whole.

    Args:
        rows: sequences in an iteration's experience.
        together: rows that stay together, such as the two of a pair; an item of the data set is so many rows.
    """

    def __init__(self, rows: int, together: int = 1) -> None:
        self.size, self.together = rows // together, together
        self.experience: Any = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, items: list[int]) -> Any:
        """One minibatch at once: one expression over all fields."""
        rows = [item * self.together + i for item in items for i in range(self.together)]
        return trimmed(type(self.experience)(*(field[rows] for field in self.experience)))


def experience_loader(
    dataset: ExperienceDataset, batch_size: int, passes: int, seed: int, world_size: int, rank: int, groups_of: int = 1
) -> ResumableLoader:
    """Minibatches of `batch_size` rows in K passes: this rank's share of each step. So many items at a time are
    shuffled."""
    items = batch_size // dataset.together
    how = dict(shuffle=True, seed=seed, passes=passes, together=groups_of)
    batches = EvenBatches(len(dataset), items, world_size, rank, **how)
    return ResumableLoader(dataset, batches, collate_fn=_as_it_is)


def _as_it_is(minibatch: Any) -> Any:
    return minibatch
