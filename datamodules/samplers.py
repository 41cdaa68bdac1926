"""In which order training rows come."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Dataset, DistributedSampler

WINDOW = 16
"""Batches within which rows of like length are put together: random enough to learn from, sorted enough to save."""


class LengthGroupedSampler(DistributedSampler):
    """A DistributedSampler whose batches hold rows of like length, so that little is padded.

    The rank's shuffled rows are cut into windows of `WINDOW` batches; within a window rows are sorted by length, and
    the batches come in random order. Which rows a window holds, and all of it, depends on seed and epoch alone.

    Args:
        dataset: the rows.
        lengths: one length per row, in any unit.
        batch_size: rows per batch.
        num_replicas: number of processes.
        rank: index of this process.
        seed: of the order.
    """

    def __init__(
        self, dataset: Dataset, lengths: Sequence[int], batch_size: int, num_replicas: int, rank: int, seed: int
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        self.lengths, self.batch_size = lengths, batch_size

    def __iter__(self) -> Iterator[int]:
        rows = list(super().__iter__())
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        size = WINDOW * self.batch_size
        for start in range(0, len(rows), size):
            window = sorted(rows[start : start + size], key=lambda row: self.lengths[row])
            batches = [window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)]
            short = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # must stay last to stay a batch
            order = torch.randperm(len(batches), generator=generator).tolist()
            for batch in [batches[i] for i in order] + short:
                yield from batch
