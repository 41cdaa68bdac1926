"""What the model says to the same held-out prompts, evaluation after evaluation."""

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data.distributed import DistributedSampler

from ..ranks import of_all_ranks
from ._shared import Columns, interleave
from .samples import RowFile
from .sinks import GrowingTable, Rows


class ValidationSamples(L.Callback):
    """Keep all held-out rows of every evaluation in `fit`, and a table of some of them in the run's loggers.

    Reads the dict of columns that `validation_step` returns; a module that returns none (any offline method) is left
    alone. Rows of all ranks are written in the order of the data, with the number of finished iterations and of
    optimizer steps. The sanity check is the evaluation before training, if it covers all held-out data: give the
    trainer `num_sanity_val_steps: -1`. In the table `samples/validation` the rows of one prompt stand one below the
    other, so that one can read down the training.

    Args:
        num_samples: of how many prompts, the first ones, the loggers get a table; 0 logs none.
        filename: name of the CSV file in the trainer's `default_root_dir`. A resumed run continues it; rows of the
            evaluations that it repeats are replaced.
    """

    def __init__(self, num_samples: int = 16, filename: str = "validation.csv") -> None:
        if num_samples < 0:
            raise ValueError(f"`num_samples` must be at least 0, but is {num_samples}.")
        self.num_samples = num_samples
        self.filename = filename
        self._file: RowFile | None = None
        self._table = GrowingTable("samples/validation")
        self._batch_rows: Rows = []
        self._shown = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._file = RowFile(Path(trainer.default_root_dir) / self.filename, key="step")
        self._table, self._shown = GrowingTable(self._table.key), 0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._batch_rows = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit" and isinstance(outputs, dict) and "response" in outputs and dataloader_idx == 0:
            self._batch_rows += as_rows(outputs)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or (trainer.sanity_checking and not is_before_training(trainer)):
            return
        rows = merge_ranks(of_all_ranks(self._batch_rows), held_out_size(trainer))
        self._batch_rows = []
        if rows and trainer.is_global_zero:
            place = {"iteration": finished_iterations(trainer), "step": trainer.global_step}
            self._file.add([place | row for row in rows])
            self._shown += min(self.num_samples, len(rows))
            self._table.offer(trainer, self._shown, self._by_prompt)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._table.offer(trainer, self._shown, self._by_prompt, last=True)

    def _by_prompt(self) -> Rows:
        seen: Counter[str] = Counter()

        def wanted(row: dict[str, str]) -> bool:
            seen[row["step"]] += 1
            return seen[row["step"]] <= self.num_samples

        rows, number = [], Counter()
        for row in self._file.rows(wanted):  # what stays the same is the place in the data: texts may repeat
            rows.append({"prompt_number": number[row["step"]], **row})
            number[row["step"]] += 1
        return sorted(rows, key=lambda row: (row["prompt_number"], row["step"]))


def is_before_training(trainer: L.Trainer) -> bool:
    """Whether a sanity check is the evaluation before training: on all held-out data, in a run that is not resumed."""
    return trainer.global_step == 0 and trainer.num_sanity_val_batches == trainer.num_val_batches


def finished_iterations(trainer: L.Trainer) -> int:
    """Iterations that are done when `fit` evaluates: all batches of the current one, or some of them."""
    if trainer.sanity_checking:
        return trainer.current_epoch
    return trainer.current_epoch + trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def as_rows(columns: Columns) -> Rows:
    """Columns, which may be tensors, as rows."""
    plain = {name: _plain_list(column) for name, column in columns.items()}
    return [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]


def merge_ranks(parts: list[Rows], size: int | None) -> Rows:
    """All ranks' rows in the order of the data.

    Args:
        parts: each rank's rows.
        size: length of the data set if a distributed sampler dealt it out; what is beyond it are padded repeats.
    """
    if size is None and all(part == parts[0] for part in parts):  # one rank, or every rank saw everything
        return parts[0]
    return interleave(parts)[:size]


def held_out_size(trainer: L.Trainer) -> int | None:
    """Length of the validation data set, if a distributed sampler deals it out."""
    loaders = trainer.val_dataloaders
    loader = loaders[0] if isinstance(loaders, list) else loaders
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        return len(loader.dataset)
    return None


def _plain_list(column: Any) -> list:
    if hasattr(column, "tolist"):
        return column.tolist()
    return [value.item() if hasattr(value, "item") else value for value in column]
