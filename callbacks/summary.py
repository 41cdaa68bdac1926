"""What a stage ended with, in one look and in one JSON file."""

import json
import time
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import WandbLogger

from ..report.figures import duration
from ._shared import final_metrics, json_safe, peak_memory_gib, write_atomically

_MOST_ROWS = 14
_RESULTS = (
    "config.yaml",
    "run.json",
    "metrics.csv",
    "samples.csv",
    "validation.csv",
    "summary.json",
    "alarms.jsonl",
    "nonfinite",
    "model",
    "best",
)
_SHOWN = ("val/", "test/", "train/loss", "rollout/")


class StageSummary(L.Callback):
    """Print a short table when a fit or test has ended, and write all final metrics to `summary.json`.

    The table holds the final figures, wall time, the process's peak memory and the files that the run left.
    `summary.json` in the trainer's `default_root_dir` holds every metric; a test adds its own to what the fit wrote.

    Args:
        metrics: names of the logged metrics to print. By default those starting with `val/`, `test/` or `rollout/`, and
            `train/loss`; at most 14.
    """

    def __init__(self, metrics: list[str] | None = None) -> None:
        self.metrics = metrics
        self._started = time.monotonic()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._started = time.monotonic()

    # In `teardown`, so that what other callbacks write in `on_fit_end` is listed whatever their order. Lightning does
    # not call it when an exception ended the run.
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage not in ("fit", "test"):
            return
        metrics = final_metrics(trainer)
        if not trainer.is_global_zero:
            return
        root = Path(trainer.default_root_dir)
        earlier = _read(root / "summary.json") if stage == "test" else {}
        text = json.dumps(json_safe({**earlier, **metrics}), indent=2)
        write_atomically(root / "summary.json", text + "\n")
        rows = [*choose(metrics, self.metrics), ("wall time", duration(time.monotonic() - self._started))]
        if (peak := peak_memory_gib()) is not None:
            rows.append(("peak memory", f"{peak:.2f} GiB"))
        title = f"{type(pl_module).__name__}: {trainer.state.fn.value}"
        print_table(title, rows, left_files(trainer))


def choose(metrics: dict[str, float], names: list[str] | None) -> list[tuple[str, str]]:
    """The metrics to print with their values as text."""
    if names is None:
        shown = [name for name in metrics if not name.endswith(("_step", "_epoch"))]
        wanted = [name for start in _SHOWN for name in shown if name.startswith(start)][:_MOST_ROWS]
    else:
        wanted = [name for name in names if name in metrics]
    return [(name, f"{metrics[name]:.4g}") for name in wanted]


def left_files(trainer: L.Trainer) -> list[Path]:
    """The results of a run that exist, as far as their places are known."""
    root = Path(trainer.default_root_dir)
    folders = [root] + [Path(logger.log_dir) for logger in trainer.loggers if getattr(logger, "log_dir", None)]
    paths = [folder / name for folder in folders for name in _RESULTS]
    paths += [Path(c.last_model_path or c.best_model_path) for c in trainer.checkpoint_callbacks if _has_file(c)]
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            paths.append(Path(logger.save_dir or ".", "wandb", "latest-run").resolve())
    return [path for path in dict.fromkeys(paths) if path.exists()]


def print_table(title: str, rows: list[tuple[str, str]], paths: list[Path]) -> None:
    """Print figures as a table and paths as lines, so that a long path can be copied whole."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, value in rows:
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for path in paths:
        console.print(str(path), soft_wrap=True, markup=False, highlight=False)


def _has_file(checkpoint) -> bool:
    return bool(getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", ""))


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
