"""The data of one on-policy iteration, and the fixed-length data set through which Lightning's loop reads it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

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


class ExperienceDataset(Dataset):
    """A map-style data set of fixed length whose content is replaced at the start of every epoch."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.experience: Experience | None = None

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, indices: list[int]) -> Experience:
        """One minibatch at once: one expression over all fields."""
        return trimmed(Experience(*(field[indices] for field in self.experience)))

    def __getitem__(self, index: int) -> Experience:
        return self.__getitems__([index])


class ShuffledPasses(DistributedSampler):
    """K passes over a data set, each in a new order that depends on nothing but seed, epoch, rank and pass.

    It is a DistributedSampler of one replica because each rank's experience is its own: Lightning leaves such a sampler
    as it is and tells it the epoch.
    """

    def __init__(self, dataset: Dataset, passes: int, seed: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, seed=seed)
        self.passes, self.stream = passes, rank

    def __iter__(self) -> Iterator[int]:
        for k in range(self.passes):
            generator = generator_for(self.seed, self.epoch, self.stream, k)
            yield from torch.randperm(len(self.dataset), generator=generator).tolist()

    def __len__(self) -> int:
        return self.passes * len(self.dataset)


def experience_loader(dataset: Dataset, batch_size: int, passes: int, seed: int, rank: int) -> DataLoader:
    """Minibatches of K shuffled passes."""
    sampler = ShuffledPasses(dataset, passes, seed, rank)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=_as_it_is)


def _as_it_is(minibatch: Experience) -> Experience:
    return minibatch


def generator_for(seed: int, *stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends only on its arguments, so that a resumed run draws what an uninterrupted one does."""
    for number in stream:
        seed = (seed * 1_000_003 + number % 1_000_003 + 1) % (2**63 - 25)  # never + 0, which would be no stream at all
    return torch.Generator(device).manual_seed(seed)
