"""What the DataModules share: arguments, reading and splitting, loaders."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from ..loaders import EvenBatches, ResumableLoader, Rows
from .sources import Source, describe, fetch_source, iterate, load_source
from .splits import draw, first_of, hold_out


class Fate(NamedTuple):
    """What the length limit does to a row: `cut` shortens it, not `kept` leaves it out."""

    cut: bool
    kept: bool


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


class TextDataModule(L.LightningDataModule):
    """Reads, checks, splits and loads text; subclasses say what a row is.

    `setup` reads and checks all rows, before a model is loaded; rows are tokenised in the loaders.

    Args:
        data: Training data: a hub id (`owner/name` or `owner/name:config`), the path of a .jsonl, .json, .csv or
            .parquet file, a folder of those, `vader:NAME` (human ratings: movieReviewSnippets, tweets,
            nytEditorialSnippets, amazonReviewSnippets) or a datasets object. Splits named train, validation (or val)
            and test are used as such; data with one split only is training data.
        val_data: Validation data, given like `data`; None uses the validation split of `data`.
        test_data: Test data, given like `data`; None uses the test split of `data`.
        tokenizer: A tokenizer, or the model to take one from (hub id, folder, `package:NAME`); None takes the tokenizer
            of the module under training.
        batch_size: Most rows per training batch and process. Rows are shared out evenly: each is in one batch, all
            processes have as many batches, and batches hold at most `batch_size` rows and differ by at most one.
        val_batch_size: The same of validation, test and prediction batches; None means `batch_size`.
        max_length: Most tokens per sequence; longer ones are cut from the right, and counted in one warning.
        val_share: Share of the rows to hold out for validation if there is no validation data. A hash of the row's text
            (its prompt if it has one) decides, so equal texts stay on one side and the choice never changes.
        max_rows: Train on this many rows, drawn at random by `seed`; None uses all.
        max_val_rows: Validate, and test, on this many rows, drawn likewise; None uses all.
        group_by_length: Put training rows of like length into the same batch, and validation rows in order of length:
            less padding, more speed. Rows are still shuffled within and across windows of 16 batches.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        seed: Seed of the order of training rows (which also depends on the epoch) and of `max_rows`.
        predict_split: Split that `predict` works on, in the order of the data; None is the test split, else the
            validation split.
    """

    def __init__(
        self,
        data: Source,
        val_data: Source | None = None,
        test_data: Source | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        max_length: int = 1024,
        val_share: float = 0.0,
        max_rows: int | None = None,
        max_val_rows: int | None = None,
        group_by_length: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        predict_split: Literal["train", "validation", "test"] | None = None,
    ) -> None:
        super().__init__()
        val_batch_size = batch_size if val_batch_size is None else val_batch_size
        at_least(1, batch_size=batch_size, val_batch_size=val_batch_size, max_length=max_length)
        at_least(1, max_rows=max_rows, max_val_rows=max_val_rows)
        at_least(0, num_workers=num_workers)
        if not 0 <= val_share < 1:
            raise ValueError(f"`val_share` must be at least 0 and less than 1, not {val_share}")
        self.sources = {"data": data, "val_data": val_data, "test_data": test_data}
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.max_length = max_length
        self.val_share, self.max_rows, self.max_val_rows = val_share, max_rows, max_val_rows
        self.group_by_length, self.num_workers, self.seed = group_by_length, num_workers, seed
        self.predict_split = predict_split
        self.rows: dict[str, Dataset] = {}  # by split, filled by setup
        self._tokenizer = tokenizer
        self._measured = False

    # What a subclass says

    def select(self, dataset: Dataset, where: str) -> Dataset:
        """The columns that are used, under the names that `check_row`, `measure` and the collate function expect."""
        raise NotImplementedError

    def check_row(self, row: dict[str, Any]) -> None:
        """Raise a ValueError that says what is wrong with the row, if anything is."""
        raise NotImplementedError

    def measure(self, row: dict[str, Any]) -> Fate:
        """What the length limit does to the row."""
        raise NotImplementedError

    def identity(self, row: dict[str, Any]) -> Any:
        """What `val_share` hashes: the prompt, else the text, else the whole row."""
        return row.get("prompt") or row.get("text") or row

    def wording(self, row: dict[str, Any]) -> str:
        """All text of the row; its number of characters is a good enough measure of its tokens."""
        return "".join(value if isinstance(value, str) else str(value) for value in row.values() if _is_text(value))

    def collate_function(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """From rows to a batch. Free of references to this object, so that worker processes can have it."""
        raise NotImplementedError

    def report(self, cut: int, dropped: int, total: int) -> None:
        """Tell the user about shortened rows and rows left out."""
        if cut or dropped:
            rank_zero_warn(
                f"{cut} of {total} rows have more than `max_length`={self.max_length} tokens and are cut from the right"
                + (f"; {dropped} of them would keep nothing to learn from and are left out" if dropped else "")
            )

    # Lightning's hooks

    def prepare_data(self) -> None:
        """Download into caches; one process per machine."""
        for flag, source in self.sources.items():
            fetch_source(source, flag)

    def setup(self, stage: str | None = None) -> None:
        """Read and check everything, once for all stages."""
        if not self.rows:
            self.rows = self._read()
        if self._find_tokenizer() is not None:
            self._apply_lengths()

    def train_dataloader(self) -> Any:
        """Shuffled by seed and epoch; Lightning tells the sampler the epoch. A resumed run goes on within the epoch."""
        rows = self.ready("train")
        lengths = [len(self.wording(row)) for row in iterate(rows)] if self.group_by_length else None
        return self._loader(rows, self.batch_size, shuffle=True, lengths=lengths)

    def val_dataloader(self) -> Any:
        """In order; an empty list, which Lightning skips, if there is no validation data."""
        if "validation" in self.rows:
            return self._held_out(self.ready("validation"))
        # Lightning warns of the empty list that its documentation tells one to return.
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
        return []

    def test_dataloader(self) -> Any:
        """The test split, else the validation split."""
        return self._held_out(self._test_rows())

    def predict_dataloader(self) -> Any:
        """The test split, else the validation split, or `predict_split`; in the order of the data."""
        split = self.predict_split
        if split is not None and self.rows and split not in self.rows:
            raise ValueError(f"`predict_split`={split}: the data has only {', '.join(self.rows)}")
        return self._loader(self._test_rows() if split is None else self.ready(split), self.val_batch_size)

    # For subclasses and modules

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer given, or that of the module under training."""
        found = self._find_tokenizer()
        if found is None:
            raise ValueError("there is no tokenizer: give `tokenizer`, or train a module that has one")
        return found

    def ready(self, split: str) -> Dataset:
        """Rows of a split, lengths applied; the module's tokenizer may come only after `setup`."""
        if not self.rows:
            raise ValueError("no data is read yet: call `setup` before asking for a loader")
        self._apply_lengths()
        return self.rows[split]

    def placement(self) -> tuple[int, int]:
        """(number of processes, index of this one)."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    # Steps of the above

    def _find_tokenizer(self) -> PreTrainedTokenizerBase | None:
        if isinstance(self._tokenizer, str):
            from ..pretrained import load_tokenizer  # not needed with a tokenizer at hand

            self._tokenizer = load_tokenizer(self._tokenizer)
        if isinstance(self._tokenizer, PreTrainedTokenizerBase):
            return self._tokenizer
        return getattr(getattr(self.trainer, "lightning_module", None), "tokenizer", None)

    def _read(self) -> dict[str, Dataset]:
        rows: dict[str, Dataset] = dict(self._load("data"))
        if self.sources["val_data"] is not None:
            rows["validation"] = first_of(self._load("val_data"), "validation", "test", "train")
        if self.sources["test_data"] is not None:
            rows["test"] = first_of(self._load("test_data"), "test", "validation", "train")
        if "validation" not in rows and self.val_share:
            rows |= hold_out(rows["train"], self.val_share, self.identity)
        limits = {"train": self.max_rows, "validation": self.max_val_rows, "test": self.max_val_rows}
        return {split: draw(dataset, limits[split], self.seed) for split, dataset in rows.items()}

    def _load(self, flag: str) -> DatasetDict:
        source = self.sources[flag]
        splits = load_source(source, flag)
        for split in splits:
            where = describe(source, flag) + (f" ({split})" if len(splits) > 1 else "")
            splits[split] = self.select(splits[split], where)
            for number, row in enumerate(iterate(splits[split])):
                try:
                    self.check_row(row)
                except ValueError as error:
                    raise ValueError(f"{where}, row {number} (the first is 0): {error}") from None
        return splits

    def _apply_lengths(self) -> None:
        if self._measured:
            return
        cut = dropped = total = 0
        for split, dataset in self.rows.items():
            fates = [self.measure(row) for row in iterate(dataset)]
            kept = [i for i, fate in enumerate(fates) if fate.kept]
            cut, dropped = cut + sum(fate.cut for fate in fates), dropped + len(fates) - len(kept)
            total += len(fates)
            if not kept:
                raise ValueError(f"no {split} row is left within the length limits; change them or give other data")
            if len(kept) < len(fates):
                self.rows[split] = dataset.select(kept, keep_in_memory=True)
        self._measured = True
        self.report(cut, dropped, total)

    def _test_rows(self) -> Dataset:
        split = next((name for name in ("test", "validation") if name in self.rows), None)
        if self.rows and split is None:
            raise ValueError("there is no test or validation data: give `test_data`, `val_data` or `val_share`")
        return self.ready(split or "test")

    def _held_out(self, rows: Dataset) -> ResumableLoader:
        if self.group_by_length:
            order = sorted(range(len(rows)), key=lambda i: len(self.wording(rows[i])))
            rows = rows.select(order, keep_in_memory=True)
        return self._loader(rows, self.val_batch_size)

    def _loader(
        self, rows: Dataset, batch_size: int, shuffle: bool = False, lengths: list[int] | None = None
    ) -> ResumableLoader:
        # Our own sampler: Lightning adds one only if `use_distributed_sampler` is on, and its own repeats rows.
        world_size, rank = self.placement()
        return ResumableLoader(
            Rows(rows),
            EvenBatches(len(rows), batch_size, world_size, rank, shuffle, self.seed, lengths=lengths),
            collate_fn=self.collate_function(),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # else each pass draws from the global one
        )


def at_least(minimum: int, **arguments: int | None) -> None:
    """Check numbers given by the user; None stands for no limit."""
    for name, value in arguments.items():
        if value is not None and value < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, not {value}")
