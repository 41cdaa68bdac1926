"""Tables, pages and images to whatever loggers a run has: each gets what it can show.

    Weights & Biases    tables, pages and images, in the workspace
    TensorBoard         tables as text, images; no pages
    MLflow              artifacts: CSV, HTML and PNG files, which its interface shows
    others              nothing: what matters is in files in the run's folder anyway

A logger that fails is a warning.
"""

import csv
import io
from collections.abc import Callable
from functools import singledispatch
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from ..loggers import forgiving_io

Rows = list[dict[str, Any]]
MOST_ROWS = 10_000  # what W&B shows of a table
GROWTH = 1.1


def log_table(logger: Logger, key: str, columns: list[str], rows: Rows, step: int) -> None:
    """Log a table; one with the same key before it is replaced.

    Args:
        logger: any of the run's loggers.
        key: name, such as `samples/rollouts`.
        columns: their order. What a row lacks is left empty.
        rows: what is in it.
        step: the trainer's `global_step`.
    """
    with forgiving_io(f"`{key}` of {type(logger).__name__}", Exception):
        _table(logger, key, columns, [[row.get(name) for name in columns] for row in rows], step)


def log_html(logger: Logger, key: str, html: str, step: int) -> None:
    """Log a self-contained page. The arguments are those of `log_table`."""
    with forgiving_io(f"`{key}` of {type(logger).__name__}", Exception):
        _html(logger, key, html, step)


def log_image(logger: Logger, key: str, path: Path, step: int) -> None:
    """Log an image from a PNG file. The arguments are those of `log_table`."""
    with forgiving_io(f"`{key}` of {type(logger).__name__}", Exception):
        _image(logger, key, path, step)


class GrowingTable:
    """A table with the rows of the whole run, logged again and again under one key as it grows.

    Only one whole table can be read in every view of W&B: of one that is logged piece by piece
    (`log_mode="INCREMENTAL"`) a project's workspace shows the last piece, a run's the last hundred
    (https://github.com/wandb/wandb/pull/9810), and of several under one key the last. It is logged when it has grown by
    a tenth, so that all tables of a run are together at most eleven times the last one; and at the end.

    Args:
        key: name of the table.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._logged = 0

    def offer(self, trainer: L.Trainer, count: int, read: Callable[[], Rows], last: bool = False) -> None:
        """Log the table if it is time.

        Args:
            trainer: whose loggers get it.
            count: rows that it has now.
            read: gives them, each with a column `iteration`.
            last: whether no other will come.
        """
        shown = [logger for logger in trainer.loggers if _table.dispatch(type(logger)) is not _table.dispatch(object)]
        if not shown or count == self._logged or (not last and count < GROWTH * self._logged):
            return
        self._logged = count
        rows = thinned(read(), MOST_ROWS)
        for logger in shown:
            log_table(logger, self.key, list(dict.fromkeys(name for row in rows for name in row)), rows,
                      trainer.global_step)  # fmt: skip


def thinned(rows: Rows, most: int) -> Rows:
    """Rows of so few iterations, evenly spaced and with the last one, that they are at most so many."""
    iterations = sorted({row["iteration"] for row in rows}, reverse=True)
    kept = set(iterations[:: -(-len(rows) // most) or 1])
    return [row for row in rows if row["iteration"] in kept]


@singledispatch
def _table(logger: Logger, key: str, columns: list[str], data: list[list], step: int) -> None:
    """Nothing, in general."""


@_table.register
def _(logger: WandbLogger, key: str, columns: list[str], data: list[list], step: int) -> None:
    logger.log_table(key, columns=columns, data=data, step=step)


@_table.register
def _(logger: TensorBoardLogger, key: str, columns: list[str], data: list[list], step: int) -> None:
    logger.experiment.add_text(key, markdown(columns, data), step)


@_table.register
def _(logger: MLFlowLogger, key: str, columns: list[str], data: list[list], step: int) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([columns, *data])
    # not its `log_table`, which would add to the table before it
    logger.experiment.log_text(logger.run_id, text.getvalue(), f"{key}.csv")


@singledispatch
def _html(logger: Logger, key: str, html: str, step: int) -> None:
    """Nothing, in general."""


@_html.register
def _(logger: WandbLogger, key: str, html: str, step: int) -> None:
    import wandb

    logger.log_metrics({key: wandb.Html(html, inject=False)}, step)


@_html.register
def _(logger: MLFlowLogger, key: str, html: str, step: int) -> None:
    logger.experiment.log_text(logger.run_id, html, f"{key}_{step}.html")


@singledispatch
def _image(logger: Logger, key: str, path: Path, step: int) -> None:
    """Nothing, in general."""


@_image.register
def _(logger: WandbLogger, key: str, path: Path, step: int) -> None:
    logger.log_image(key, [str(path)], step=step)


@_image.register
def _(logger: TensorBoardLogger, key: str, path: Path, step: int) -> None:
    from matplotlib.image import imread

    logger.experiment.add_image(key, imread(path)[..., :3], step, dataformats="HWC")


@_image.register
def _(logger: MLFlowLogger, key: str, path: Path, step: int) -> None:
    logger.experiment.log_artifact(logger.run_id, str(path), key.rpartition("/")[0] or None)


def markdown(columns: list[str], data: list[list]) -> str:
    """A Markdown table; a line break within a cell is ⏎."""
    lines = [columns, ["---"] * len(columns), *data]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else str(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return " ⏎ ".join(text.splitlines())
