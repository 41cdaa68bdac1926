"""What `trainer.predict` returns, as JSON lines."""

import json
from pathlib import Path
from typing import Any

import lightning as L

from ..loaders import EvenBatches
from ..ranks import of_all_ranks
from ._shared import json_safe, write_atomically

Keyed = tuple[int, int, int, str]  # data loader, position in its data set, row of that sample, JSON line


class JSONLinesWriter(L.Callback):
    """Write the columns that `predict_step` returns, one JSON object a line, in the order of the data.

    Rows are gathered from all ranks and written once by rank zero, to a temporary file that then takes the final name:
    the file is whole or absent. Samples that a distributed sampler repeats to fill its last round are written once.

    It is no BasePredictionWriter, because Lightning warns a BasePredictionWriter of loaders without a batch sampler.

    Args:
        filename: name of the file in the trainer's `default_root_dir`.
    """

    def __init__(self, filename: str = "predictions.jsonl") -> None:
        self.filename = filename
        self._rows: list[Keyed] = []
        self._seen: dict[int, int] = {}
        self._batches: dict[int, list[list[int]]] = {}

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._rows, self._seen, self._batches = [], {}, {}

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        lines = json_lines(outputs)
        samples = self._samples(trainer, batch_idx, dataloader_idx)
        if not samples or len(lines) % len(samples):
            # Other loaders hide their indices: take it that sample i went to rank i % world.
            start = self._seen.get(dataloader_idx, 0)
            samples = [(start + i) * trainer.world_size + trainer.global_rank for i in range(len(lines))]
            self._seen[dataloader_idx] = start + len(lines)
        per_sample = max(1, len(lines) // max(1, len(samples)))
        self._rows += [(dataloader_idx, samples[i // per_sample], i % per_sample, line) for i, line in enumerate(lines)]

    def _samples(self, trainer: L.Trainer, batch_idx: int, dataloader_idx: int) -> list[int]:
        """Positions in the data set of a batch's samples; empty for a loader that does not tell."""
        loaders = trainer.predict_dataloaders
        loader = loaders[dataloader_idx] if isinstance(loaders, list) else loaders
        if isinstance(getattr(loader, "sampler", None), EvenBatches):
            if dataloader_idx not in self._batches:
                self._batches[dataloader_idx] = list(loader.sampler.batches())
            return self._batches[dataloader_idx][batch_idx]
        # Lightning wraps a DataLoader's batch sampler, to keep a list of what it gave.
        given = getattr(getattr(loader, "batch_sampler", None), "seen_batch_indices", [])
        return given[batch_idx] if given else []

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parts = of_all_ranks(self._rows)
        self._rows = []
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / self.filename
        lines = in_data_order(parts)
        write_atomically(path, "".join(line + "\n" for line in lines))
        print(f"{len(lines)} predictions in {path}")


def json_lines(prediction: Any) -> list[str]:
    """A dict of equally long columns as JSON lines."""
    if not isinstance(prediction, dict):
        raise ValueError(
            f"`predict_step` must return a dict of columns to be written, but returned {type(prediction)}."
        )
    columns = {name: json_safe(column) for name, column in prediction.items()}
    return [
        json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False)
        for row in zip(*columns.values(), strict=True)
    ]


def in_data_order(parts: list[list[Keyed]]) -> list[str]:
    """Merge the rows of all ranks by their place in the data; a sample that came twice stays once."""
    lines: dict[tuple[int, int, int], str] = {}
    for part in parts:
        for *place, line in part:
            lines.setdefault(tuple(place), line)
    return [lines[place] for place in sorted(lines)]
