"""Whether a reward model's probabilities mean what they say: its reliability diagram, as a table and as a picture."""

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L

from ..loggers import forgiving_io
from ._shared import write_atomically
from .sinks import log_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Bins = list[tuple[int, float, float, float]]  # bin, count, mean probability, mean label; only bins that are not empty

_AXES = {
    "pairs": ("probability that a text is preferred", "share of people who prefer it"),
    "levels": ("probability of a level", "share of people who gave it"),
}
_COLUMNS = ("bin", "count", "probability", "label")
_LINE, _DIAGONAL, _DPI = "#1f6f8b", "#555555", 150


class Reliability(L.Callback):
    """Keep the reliability diagram of a reward model's last validation, and of its test.

    Probabilities are put into bins of equal width; in each of them, the mean probability is set against the share of
    people who agreed. Of a calibrated model the two are the same; one whose probabilities are too extreme is flatter
    than the diagonal. Each pair enters in both orders, so the diagram is symmetric. How far it is from the diagonal, a
    mean over pairs, is `val/calibration_error`.

    Reads `pl_module.reliability`, a dict of tables (bins, 3) of count, mean probability and mean label: `pairs`, and of
    models of rating levels `levels`; modules without it are left alone. In the trainer's `default_root_dir` it leaves
    reliability.csv (columns bin, count, probability, label; bins that are empty are left out) and reliability.png; of
    levels reliability_levels.csv and .png; of a test the same with `test_` before the name. Loggers that can
    show a picture get it as `val/reliability`, `val/reliability_levels` and `test/...`.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599

    Args:
        picture: draw the diagrams; else there are only the tables.
    """

    def __init__(self, picture: bool = True) -> None:
        self.picture = picture

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._keep(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep(trainer, pl_module, "test")

    def _keep(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        for kind, table in getattr(pl_module, "reliability", {}).items():
            name = "reliability" if kind == "pairs" else f"reliability_{kind}"
            path = Path(trainer.default_root_dir) / (name if stage == "val" else f"{stage}_{name}")
            bins = filled(table.tolist())
            with forgiving_io(str(path)):
                write_atomically(path.with_suffix(".csv"), as_csv(bins))
                if self.picture:
                    plot(bins, len(table), kind).savefig(path.with_suffix(".png"), dpi=_DPI)
                    for logger in trainer.loggers:
                        log_image(logger, f"{stage}/{name}", path.with_suffix(".png"), trainer.global_step)


def filled(table: list[list[float]]) -> Bins:
    """The bins that hold anything, with their numbers from 0."""
    return [(number, *row) for number, row in enumerate(table) if row[0] > 0]


def as_csv(bins: Bins) -> str:
    """The bins as the text of a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows((number, f"{count:g}", probability, label) for number, count, probability, label in bins)
    return text.getvalue()


def plot(bins: Bins, num_bins: int, kind: str) -> "Figure":
    """The diagram above, and below how many predictions each bin has; no pyplot state, no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 5.5), layout="constrained")
    diagram, counts = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    diagram.plot([0, 1], [0, 1], color=_DIAGONAL, linestyle="--", linewidth=1, label="calibrated")
    numbers, sizes, probabilities, labels = zip(*bins, strict=True) if bins else ((), (), (), ())
    diagram.plot(probabilities, labels, color=_LINE, marker="o", clip_on=False, label="the model")
    counts.bar([(n + 0.5) / num_bins for n in numbers], sizes, width=0.9 / num_bins, color=_LINE, alpha=0.6)
    across, up = _AXES.get(kind, ("probability", "label"))
    diagram.set(xlim=(0, 1), ylim=(0, 1), ylabel=up)
    diagram.legend(frameon=False, fontsize=9)
    counts.set(xlabel=across, ylabel="count")
    for axes in (diagram, counts):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
