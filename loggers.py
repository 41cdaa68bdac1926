"""Loggers that a run does not die of: a service that is down, a slow upload, a full disk.

`forgiving(logger)` makes any Lightning logger so. What it was given while it failed may be lost to it; it is asked
again and again, and goes on as soon as it can. `forgiving_io` does the same for files that only watch a run.

    logger = forgiving(WandbLogger(...))    # offline if the server cannot be reached
    logger = MetricsFile(folder)            # metrics.csv, never half written
    with forgiving_io("samples.csv"):       # a full disk is a warning
        ...
"""

import csv
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities import rank_zero_warn

GUARDED = ("log_metrics", "log_hyperparams", "log_graph", "log_table", "log_text", "log_image", "save", "finalize",
           "after_save_checkpoint", "watch")  # fmt: skip
PAUSE = 10.0
"""A call that took t seconds to fail is followed by a pause of PAUSE · t: a dead server costs a tenth of the time."""
QUICK = 0.5
"""Seconds. What fails faster than that is tried every time."""
WANDB_LIMITS = {"init_timeout": 30.0, "finish_timeout": 300.0}
"""Seconds. W&B's own are 90, and no end: it would wait for days for a server that went down during the run."""

_told: set[str] = set()


@contextmanager
def forgiving_io(what: str, errors: type[Exception] = OSError) -> Iterator[None]:
    """Go on after an error; the first one of a kind is a warning.

    Args:
        what: what cannot be written, for the warning.
        errors: which errors are forgiven.
    """
    try:
        yield
    except errors as error:
        _tell(what, error)


def _tell(what: str, error: Exception) -> None:
    kind = f"{what}: {type(error).__name__}"
    if kind not in _told:
        _told.add(kind)
        rank_zero_warn(f"{what} cannot be written, training goes on without it ({type(error).__name__}: {error}).")


def forgiving(logger: Logger) -> Logger:
    """The same logger, whose methods never raise.

    A WandbLogger that does not reach its server within `WANDB_LIMITS` writes its run to disk instead, to be uploaded
    later with `wandb sync`; a run that is not uploaded in time after training is left on disk, too. An MLFlowLogger
    calls `val/reward/<name>` `val/reward.<name>`.

    Args:
        logger: any Lightning logger. It is changed in place: its class becomes a subclass of what it was.
    """
    if isinstance(logger, WandbLogger):
        given = logger._wandb_init.get("settings") or {}  # Lightning keeps what it will give to `wandb.init` there
        if isinstance(given, dict):
            unset = {k: v for k, v in WANDB_LIMITS.items() if f"WANDB_{k.upper()}" not in os.environ}
            logger._wandb_init["settings"] = unset | given
    kind = type(logger)
    changed: dict[str, Any] = {name: _guarded(getattr(kind, name)) for name in GUARDED if hasattr(kind, name)}
    if isinstance(logger, MLFlowLogger):
        changed["log_metrics"] = _guarded(_flat(kind.log_metrics))
    if hasattr(kind, "experiment"):
        changed["experiment"] = property(_guarded(kind.experiment.fget, DummyExperiment, _go_offline))
    logger._paused_until = 0.0
    logger.__class__ = type(kind.__name__, (kind,), changed)
    return logger


def _guarded(
    method: Callable,
    otherwise: Callable[[], Any] = lambda: None,
    rescue: Callable[[Logger, Exception], bool] | None = None,
) -> Callable:
    @wraps(method)
    def call(self: Logger, *args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        if start < self._paused_until:
            return otherwise()
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            if rescue is not None and rescue(self, error):
                return call(self, *args, **kwargs)
            now = time.monotonic()
            if now - start > QUICK:
                self._paused_until = now + PAUSE * (now - start)
            _tell(type(self).__name__, error)
            return otherwise()

    return call


def _flat(log_metrics: Callable) -> Callable:
    """MLflow keeps metrics as files: beside one that is called val/reward there is no folder of that name."""

    @wraps(log_metrics)
    def call(self: Logger, metrics: dict[str, float], step: int | None = None) -> None:
        split = {name: name.partition("/") for name in metrics}
        flat = {first + slash + rest.replace("/", "."): metrics[name] for name, (first, slash, rest) in split.items()}
        log_metrics(self, flat, step)

    return call


def _go_offline(logger: Logger, error: Exception) -> bool:
    """Whether there is something to try again: a W&B run that could not be begun online."""
    if not isinstance(logger, WandbLogger) or logger._wandb_init.get("mode") == "offline" or logger._offline:
        return False
    logger._wandb_init["mode"] = "offline"
    rank_zero_warn(
        f"W&B cannot be reached, so this run is offline ({type(error).__name__}: {error}). Its files are in "
        f"{Path(logger.save_dir or '.') / 'wandb'}; upload them later with `wandb sync`."
    )
    return True


def close_wandb(loggers: list[Logger]) -> None:
    """Write out and upload W&B runs now; at the end of the process it may be too late."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            with forgiving_io("W&B's run", Exception):
                logger._experiment.finish()


class MetricsFile(CSVLogger):
    """metrics.csv in a folder: whole at every moment, and as before after a failed write.

    Rows that could not be written stay in memory until they can.

    Args:
        folder: where the file will be.
        flush_logs_every_n_steps: rows are written at steps that are multiples of it, and at the end.
    """

    def __init__(self, folder: str | Path, flush_logs_every_n_steps: int = 100) -> None:
        folder = Path(folder)
        super().__init__(folder.parent, name=folder.name, version="", flush_logs_every_n_steps=flush_logs_every_n_steps)

    @property
    def experiment(self) -> ExperimentWriter:
        """What keeps the rows; a dummy on other ranks than zero."""
        made = super().experiment
        if type(made) is ExperimentWriter:
            made.__class__ = _WholeFileWriter
        return made


class _WholeFileWriter(ExperimentWriter):
    """Lightning's writes a new header into the file in place: a full disk there loses what it held."""

    def save(self) -> None:
        if not self.metrics:
            return
        keys = sorted({*self.metrics_keys, *chain(*self.metrics)})
        path = Path(self.metrics_file_path)
        if keys == self.metrics_keys and path.exists():
            append_rows(path, keys, self.metrics)
        else:
            replace_rows(path, keys, [*read_rows(path), *self.metrics])
        self.metrics_keys, self.metrics = keys, []


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Add rows to a CSV file, all of them or none."""
    size = path.stat().st_size
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns, restval="").writerows(rows)
    except BaseException:
        os.truncate(path, size)
        raise


def replace_rows(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Write a CSV file anew; if that fails it stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
