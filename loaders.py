"""Loaders that lose no row and repeat none, on any number of processes, and that go on where a stopped run stood.

`EvenBatches` says which rows a process has in which batch. `ResumableLoader` reads them and keeps count, for Lightning
to save in checkpoints.
"""

import copy
from collections.abc import Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

WINDOW = 16
"""Steps within which rows of like length are put together: random enough to learn from, sorted enough to save."""


class EvenBatches(DistributedSampler):
    """Lists of row numbers: each row once per pass, in as many batches on every process.

    A pass is one order of all N rows, the same on all processes, cut into k = ceil(N / (num_replicas * batch_size))
    steps of nearly equal size. So a step holds the same rows on any number of processes, and batches hold at most
    `batch_size` rows and differ by at most one. With shuffling, process r takes the r-th part of each step: what one
    process has in the r-th of its micro-batches. Without, the rows are dealt out: process r has r, r + num_replicas,
    and so on.

    With one row per batch and process, and N not a multiple of `num_replicas`, the last processes would have none at
    the last step; then k is floor(N / num_replicas), and some batches hold two rows.

    Lightning leaves a DistributedSampler in its place and tells it the epoch.

    Args:
        num_rows: N.
        batch_size: Most rows per batch and process.
        num_replicas: Number of processes.
        rank: Index of this process.
        shuffle: Whether the order is random. `seed`, epoch and number of the pass decide it, and nothing else.
        seed: Of the order.
        passes: Passes per epoch, each in a new order.
        lengths: One per row, in any unit: put rows of like length into the same step. Within windows of `WINDOW` steps
            of the shuffled order, rows are sorted by length, and the steps come in random order.
        together: So many rows that are next to each other stay so in a random order.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        num_replicas: int,
        rank: int,
        shuffle: bool,
        seed: int = 0,
        passes: int = 1,
        lengths: Sequence[int] | None = None,
        together: int = 1,
    ) -> None:
        super().__init__(range(num_rows), num_replicas, rank, shuffle, seed)
        if num_rows < num_replicas:
            raise ValueError(
                f"{num_rows} rows cannot be shared out over {num_replicas} processes, each of which needs at least one:"
                f" give at least {num_replicas} rows, or run on at most {num_rows} processes"
            )
        assert lengths is None or (shuffle and len(lengths) == num_rows)
        assert num_rows % together == 0
        self.num_rows, self.batch_size = num_rows, batch_size
        self.passes, self.lengths, self.together = passes, lengths, together
        self.steps = min(-(-num_rows // (num_replicas * batch_size)), num_rows // num_replicas)  # k, per pass
        self.start = 0  # batches that the next iteration leaves out

    def __len__(self) -> int:
        return self.passes * self.steps

    def __iter__(self) -> Iterator[list[int]]:
        yield from islice(self.batches(), self.start, None)

    def batches(self) -> Iterator[list[int]]:
        """All batches of the epoch, also those that an iteration leaves out."""
        for number in range(self.passes):
            place = 0  # in the order
            for step in self._steps(number):
                dealt = step[(self.rank - place) % self.num_replicas :: self.num_replicas]
                yield cut(step, self.num_replicas)[self.rank] if self.shuffle else dealt
                place += len(step)

    def in_order(self) -> "EvenBatches":
        """The same without shuffling."""
        other = copy.copy(self)
        other.shuffle, other.lengths = False, None
        return other

    def _steps(self, number: int) -> list[list[int]]:
        """The rows of all processes at each step of a pass."""
        if not self.shuffle:
            return cut(range(self.num_rows), self.steps)
        generator = generator_for(self.seed, self.epoch, number)
        groups = torch.randperm(self.num_rows // self.together, generator=generator)
        rows = groups[:, None] * self.together + torch.arange(self.together)
        steps = cut(rows.flatten().tolist(), self.steps)
        if self.lengths is None:
            return steps
        windows = [steps[start : start + WINDOW] for start in range(0, self.steps, WINDOW)]
        return list(chain.from_iterable(self._by_length(window, generator) for window in windows))

    def _by_length(self, window: list[list[int]], generator: torch.Generator) -> list[list[int]]:
        rows = sorted(chain.from_iterable(window), key=lambda row: self.lengths[row])
        steps = cut(rows, len(window))
        return [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]


class ResumableLoader(DataLoader):
    """A DataLoader over `EvenBatches` whose place in an epoch is saved in Lightning's checkpoints.

    After `load_state_dict` the next pass over the loader begins with the first batch not given yet, and reads no row of
    those before; if the epoch is over by then, it begins at the beginning. The length stays that of a whole epoch:
    Lightning itself counts the batches that were done before the stop.

    Args:
        dataset: Asked for a list of row numbers, gives what `collate_fn` makes a batch of. See `Rows`.
        batches: Which rows each batch holds.
        sampler: What Lightning wants in the place of `batches` where it builds the loader anew: the same to predict,
            one in order for `overfit_batches`.
        **options: Of a DataLoader: `collate_fn`, `num_workers`, `persistent_workers`, `generator` and so on.
    """

    def __init__(self, dataset: Dataset, batches: EvenBatches, sampler: Any = None, **options: Any) -> None:
        self.batches = batches.in_order() if isinstance(sampler, SequentialSampler) else batches
        self.given = 0  # batches, in the epoch that the last pass was of
        self._epoch = 0
        self._loaded: dict[str, int] | None = None
        decided = ("batch_size", "batch_sampler", "shuffle", "drop_last")  # by `batches`, but Lightning passes them
        options = {name: value for name, value in options.items() if name not in decided}
        super().__init__(dataset, batch_size=None, sampler=self.batches, **options)

    def __iter__(self) -> Iterator[Any]:
        # A generator, to do nothing before the first `next`: Lightning asks for the iterator before it tells the
        # sampler the epoch, and worker processes would begin to read at once.
        self.given = self.batches.start = self._first()
        self._epoch = self.batches.epoch
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches were given, in which epoch, and of how many."""
        return {"batches": self.given, "epoch": self._epoch, "of": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there with the next pass over the loader."""
        self.given, self._epoch, self._loaded = state["batches"], state["epoch"], dict(state)

    def _first(self) -> int:
        """The batch that a pass begins with."""
        state, self._loaded = self._loaded, None
        # The number of the epoch tells that it is over: `limit_train_batches` may end one at any batch.
        if state is None or state["epoch"] != self.batches.epoch or state["batches"] == state["of"]:
            return 0
        if state["of"] != len(self):
            raise ValueError(
                f"the checkpoint was saved within an epoch of {state['of']} batches, but now an epoch has {len(self)}:"
                " resume with the same data, batch size and number of processes, or from a checkpoint that was saved"
                " at the end of an epoch"
            )
        return state["batches"]


class Rows(Dataset):
    """A data set of single rows as one that gives a list of rows for a list of row numbers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, numbers: list[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):  # all at once, as in torch's own loader
            return self.dataset.__getitems__(numbers)
        return [self.dataset[number] for number in numbers]


def cut(rows: Sequence[int], count: int) -> list[list[int]]:
    """`count` consecutive parts whose lengths differ by at most one."""
    ends = [len(rows) * i // count for i in range(count + 1)]
    return [list(rows[start:end]) for start, end in pairwise(ends)]


def generator_for(seed: int, *stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends only on its arguments, so that a resumed run draws what an uninterrupted one does."""
    for number in stream:
        seed = (seed * 1_000_003 + number % 1_000_003 + 1) % (2**63 - 25)  # never + 0, which would be no stream at all
    return torch.Generator(device).manual_seed(seed)
