"""A few rollouts of every iteration, kept where people look for them."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L

from ..loggers import append_rows, forgiving_io, read_rows, replace_rows
from ._shared import Columns
from .sinks import GrowingTable, Rows

TEXTS = {"prompt", "response", "reference_response"}


class SampleTable(L.Callback):
    """Keep the first samples of each rollout in a CSV file, and in a table of the run's loggers.

    Reads `pl_module.samples`; a module without it (any offline method) is left alone. The table has the rows of all
    iterations one below the other, those before a resume included, under one key: `samples/rollouts`. It is the file,
    so the memory of a long run does not grow.

    Args:
        every_n_epochs: keep samples of every n-th iteration, starting with iteration 0.
        num_samples: how many samples of an iteration to keep.
        filename: name of the CSV file in the trainer's `default_root_dir`. A resumed run continues it; rows from the
            iterations it repeats are replaced.
    """

    def __init__(self, every_n_epochs: int = 1, num_samples: int = 8, filename: str = "samples.csv") -> None:
        if every_n_epochs < 1:
            raise ValueError(f"`every_n_epochs` must be at least 1, but is {every_n_epochs}.")
        self.every_n_epochs = every_n_epochs
        self.num_samples = num_samples
        self.filename = filename
        self._file: RowFile | None = None
        self._table = GrowingTable("samples/rollouts")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._file = RowFile(Path(trainer.default_root_dir) / self.filename, key="iteration")
        self._table = GrowingTable(self._table.key)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        samples = getattr(pl_module, "samples", None)
        iteration = trainer.current_epoch
        if not samples or not trainer.is_global_zero or iteration % self.every_n_epochs:
            return
        self._file.add(first_rows(samples, self.num_samples, iteration))
        self._table.offer(trainer, self._file.count, self._rows)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._table.offer(trainer, self._file.count, self._rows, last=True)

    def _rows(self) -> Rows:
        return list(self._file.rows())


class RowFile:
    """A CSV file of what was seen at growing values of one column, such as iterations.

    A resumed run continues the file: rows of a dead run from the value at which this one begins, and later ones, are
    replaced. A row whose columns are new widens the file. A failed write leaves it as it was, and is a warning.

    Args:
        path: of the file.
        key: the column.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.count = 0
        """Rows in the file, as far as this run has written to it."""
        self._columns: list[str] = []

    def add(self, rows: Rows) -> None:
        """Write rows, all of which have the same value of the key."""
        if not rows:
            return
        with forgiving_io(str(self.path)):
            columns = list(dict.fromkeys(chain(self._columns, *rows)))
            if self._columns == columns and self.path.exists():
                append_rows(self.path, columns, rows)
                self.count += len(rows)
            else:
                kept = [row for row in read_rows(self.path) if int(row[self.key]) < rows[0][self.key]]
                columns = list(dict.fromkeys(chain(columns, *kept)))
                replace_rows(self.path, columns, [*kept, *rows])
                self.count = len(kept) + len(rows)
            self._columns = columns

    def rows(self, wanted: Callable[[dict[str, str]], bool] = lambda row: True) -> Iterator[dict[str, Any]]:
        """Rows of the file with numbers as numbers; what is empty there is None."""
        with forgiving_io(str(self.path)):
            yield from (
                {name: text if name in TEXTS else parsed(text) for name, text in row.items()}
                for row in read_rows(self.path)
                if wanted(row)
            )


def parsed(text: str) -> Any:
    """A cell of a CSV file as what it was: None, a bool, an int, a float, or else the text itself."""
    plain = {"": None, "True": True, "False": False}
    if text in plain:
        return plain[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def first_rows(samples: Columns, count: int, iteration: int) -> Rows:
    """The first rows of some columns, each with its iteration."""
    total = min(len(column) for column in samples.values())
    return [
        {"iteration": iteration, **{name: _plain(column[i]) for name, column in samples.items()}}
        for i in range(min(count, total))
    ]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
