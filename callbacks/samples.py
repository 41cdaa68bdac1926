"""A few rollouts of every iteration, kept where people look for them."""

import csv
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import WandbLogger

from ._shared import Columns


class SampleTable(L.Callback):
    """Keep the first samples of each rollout in a CSV file and as Weights & Biases tables.

    Reads `pl_module.samples`; a module without it (any offline method) is left alone. One table per iteration goes to
    every W&B logger, each under its own key `samples/iteration_<n>`: a key that is logged again shows only its last
    table in the run's summary and workspace, so one shared key would hide all earlier iterations.

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
        self._columns: list[str] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._columns = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        samples = getattr(pl_module, "samples", None)
        iteration = trainer.current_epoch
        if not samples or not trainer.is_global_zero or iteration % self.every_n_epochs:
            return
        rows = first_rows(samples, self.num_samples, iteration)
        self._write(Path(trainer.default_root_dir) / self.filename, rows, iteration)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                data = [list(row.values()) for row in rows]
                # No `step`: the run's x-axis (trainer/global_step) is synchronised by W&B itself.
                logger.log_table(f"samples/iteration_{iteration}", columns=list(rows[0]), data=data)

    def _write(self, path: Path, rows: list[dict], iteration: int) -> None:
        if self._columns:
            mode, kept = "a", []
        else:  # first time in this run: the file may hold iterations that a dead run did after its last checkpoint
            mode, kept = "w", earlier_rows(path, iteration)
            self._columns = list(rows[0])
            path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="", extrasaction="ignore")
            if mode == "w":
                writer.writeheader()
            writer.writerows(kept + rows)


def first_rows(samples: Columns, count: int, iteration: int) -> list[dict]:
    """The first rows of some columns, each with its iteration."""
    total = min(len(column) for column in samples.values())
    return [
        {"iteration": iteration, **{name: _plain(column[i]) for name, column in samples.items()}}
        for i in range(min(count, total))
    ]


def earlier_rows(path: Path, iteration: int) -> list[dict]:
    """Rows of an existing CSV file from before `iteration`; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if int(row["iteration"]) < iteration]


def _plain(value):
    return value.item() if hasattr(value, "item") else value
