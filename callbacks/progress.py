"""What a run is doing, how it goes, how long it still takes: two lines in a terminal, else one line an epoch."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from statistics import median
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from ..report.figures import duration
from ._shared import final_metrics

# Logged name -> what the bar calls it, in the order shown.
SHORT_NAMES = {
    "rollout/reward": "reward",
    "rollout/kl": "kl",
    "policy/clip_fraction": "clip",
    "throughput/tokens_per_second": "tok/s",
    "train/loss": "loss",
    "train/perplexity": "ppl",
    "train/accuracy": "accuracy",
    "val/reward": "val reward",
    "val/win_rate": "win rate",
    "val/perplexity": "val ppl",
    "val/accuracy": "val accuracy",
    "val/agreement": "agreement",
}
# `clock.phase` of on-policy modules -> what the bar calls it.
PHASES = {"rollout": "rolling out", "scoring": "scoring", "update": "updating"}
STAGES = {"train": "training", "sanity_check": "checking", "validate": "validating", "test": "testing"}
STAGES |= {"predict": "predicting"}
SECONDS_BETWEEN_READINGS = 0.5  # of the figures: each is a wait for the GPU


class ProgressBar(LightningProgressBar):
    """Two lines: the epoch (or iteration), its batches, the phase, the time left; and the figures that matter.

        iteration 3/50  ━━━━━━━━━━━━━━━━━━━━  12/48  updating  2 min 05 s left
        reward 1.23  kl 4.56  clip 0.12  tok/s 12345

    On-policy methods: reward, KL, clip fraction, tokens per second, of the last whole iteration. Others: loss, and
    perplexity, accuracy or agreement. The time left is that of the epochs to come, at the median of those that were
    timed; in a first epoch of training steps alone, that of the batches. Where the output is not a terminal (a log
    file, CI) there is one plain line per epoch. If anything goes wrong in the bar, it goes out and the run goes on.

    Args:
        refresh_rate: redraws per second; 0 turns it off.
    """

    def __init__(self, refresh_rate: int = 4) -> None:
        super().__init__()
        self.refresh_rate, self._plain = refresh_rate, not is_terminal()
        self._enabled, self._live = refresh_rate > 0, None
        self._figures: dict[str, str] = {}
        self._read = -math.inf
        self.pace = Pace()
        self.done, self.total = 0, math.inf  # batches
        self._began = time.monotonic()
        self._took: float | None = None  # seconds, when the training is over
        self._epoch: int | None = None  # one that is over and was not yet told of

    def enable(self) -> None:
        """Lightning's hook."""
        self._enabled = self.refresh_rate > 0

    def disable(self) -> None:
        """Lightning's hook, for all ranks but the first."""
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`pl_module.print`: above the bar."""
        if self._enabled:
            print(*args, **kwargs)

    # --- drawing ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._live is None and self._enabled and not self._plain:
            self._live = Live(
                get_renderable=self._draw, console=Console(force_terminal=True), refresh_per_second=self.refresh_rate
            )
            self._guarded(self._live.start)

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with suppress(Exception):
                live.stop()

    def _draw(self) -> RenderableType:
        """Called from a thread of rich's, at any moment."""
        try:
            return Group(
                self._first_line(), Text("  ".join(f"{k} {v}" for k, v in self._figures.items()), style="cyan")
            )
        except Exception as error:
            return Text(f"no progress bar: {error!r}")

    def _first_line(self) -> Table:
        table = Table.grid(padding=(0, 2), expand=True)
        known = math.isfinite(self.total)
        bar = Bar(total=self.total if known else None, completed=self.done, pulse=not known)
        total = str(int(self.total)) if known else "?"
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        table.add_column(no_wrap=True, justify="right", min_width=2 * len(total) + 1)  # lest the bar changes its length
        table.add_column(no_wrap=True, min_width=len("rolling out"))
        table.add_column(no_wrap=True, justify="right", min_width=len("59 min 59 s left"))
        table.add_row(self._where(), bar, f"{self.done}/{total}", self._phase(), self._time_left())
        return table

    def _where(self) -> str:
        if self.trainer.state.fn != "fit":
            return str(self.trainer.state.fn.value)
        unit = "epoch" if phase_of(self.trainer.lightning_module) is None else "iteration"
        epochs = epochs_of_run(self.trainer)
        of = f"/{math.ceil(epochs)}" if math.isfinite(epochs) else ""
        return f"{unit} {self.trainer.current_epoch + (self._took is None)}{of}"

    def _phase(self) -> str:
        if self._took is not None:
            return "done"
        stage = self.trainer.state.stage
        shown = STAGES.get(stage.value, "") if stage else ""
        phase = phase_of(self.trainer.lightning_module)
        return PHASES.get(phase, shown) if self.trainer.training else shown

    def _time_left(self) -> str:
        if self._took is not None:
            return f"in {duration(self._took)}"
        if self.trainer.state.fn != "fit":
            return ""
        first_counts = phase_of(self.trainer.lightning_module) is None  # else an epoch begins with a rollout
        share = self.done / self.total if first_counts else 0.0
        left = self.pace.seconds_left(epochs_of_run(self.trainer) - self.trainer.current_epoch, share)
        return "" if left is None else f"{duration(left)} left"

    # --- following the run ------------------------------------------------------------------------------------------

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, str]:
        """What the bar shows; a module with none of the known names shows what it logged with `prog_bar=True`."""
        return short_figures(trainer.callback_metrics) or short_figures(trainer.progress_bar_metrics, rename=False)

    def _follow(self, done: int, stage: str) -> None:
        """So many batches of a stage's current loader are done."""

        def follow() -> None:
            name = "total_train_batches" if stage == "train" else f"total_{stage}_batches_current_dataloader"
            self.done, self.total = done, getattr(self, name)
            if self._live is not None and time.monotonic() - self._read > SECONDS_BETWEEN_READINGS:
                self._read_figures()

        if self._enabled:
            self._guarded(follow)

    def _read_figures(self) -> None:
        self._figures = self.get_metrics(self.trainer, self.trainer.lightning_module)
        self._read = time.monotonic()

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._stop()
            self._enabled = False
            rank_zero_warn(f"The progress bar is off, as it failed: {error!r}")

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        self._start()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar; a run that was resumed within an epoch has some of its batches done."""
        self._start()
        self.pace, self._began, self._took = Pace(), time.monotonic(), None
        self._follow(trainer.fit_loop.epoch_loop.batch_progress.current.completed, "train")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._tell()
        self.pace.start_epoch()
        self._follow(0, "train")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One more batch."""
        self._follow(batch_idx + 1, "train")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The epoch is over."""
        final_metrics(trainer)  # read on all ranks, as reading may reduce over them; the bar itself reads on rank zero
        self.pace.end_epoch()
        self._epoch = trainer.current_epoch

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how long it took."""
        self._tell()
        self._took = time.monotonic() - self._began

    def _tell(self) -> None:
        """The figures of an epoch that is over. Not at its end: there the module has not logged all of its own."""
        epoch, self._epoch = self._epoch, None
        if epoch is None or not self._enabled:
            return
        self._guarded(self._read_figures)
        if self._plain:
            print(f"epoch {epoch}: " + ", ".join(f"{k} {v}" for k, v in self._figures.items()), flush=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        self._start()

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """One more batch of the evaluation."""
        self.has_dataloader_changed(dataloader_idx)  # notes it
        stage = trainer.state.stage.value
        self._follow(batch_idx + 1, stage if stage in ("test", "predict") else "val")

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Back to the training's batches."""
        self.reset_dataloader_idx_tracker()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._follow(trainer.fit_loop.epoch_loop.batch_progress.current.ready, "train")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the last state on the screen."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal to the error."""
        self._stop()


class Pace:
    """How long epochs take. Times are seconds of a clock that only goes forward.

    Args:
        clock: where "now" comes from.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._durations: list[float] = []
        self._start: float | None = None  # none in an epoch that a stopped run began

    def start_epoch(self) -> None:
        """An epoch begins."""
        self._start = self._clock()

    def end_epoch(self) -> None:
        """It ends, validation included."""
        if self._start is not None:
            self._durations.append(self._clock() - self._start)
        self._start = None

    def seconds_left(self, epochs: float, share: float = 0.0) -> float | None:
        """Until the run ends.

        Args:
            epochs: to go, the one under way among them.
            share: of the epoch under way that is done, for a guess before any was timed; 0 where it tells nothing.

        Returns:
            None if nothing is known.
        """
        if not math.isfinite(epochs):
            return None
        elapsed = 0.0 if self._start is None else self._clock() - self._start
        if self._durations:
            return max(median(self._durations) * epochs - elapsed, 0.0)
        return elapsed / share * (epochs - share) if share > 0 and elapsed > 0 else None


def phase_of(pl_module: L.LightningModule) -> str | None:
    """What an on-policy module does now; of other modules None."""
    return pl_module.clock.phase if hasattr(pl_module, "clock") else None


def is_terminal() -> bool:
    """Whether somebody may look at the output while it is written."""
    return sys.stdout.isatty()


def epochs_of_run(trainer: L.Trainer) -> float:
    """Epochs from the run's beginning to its end, by `max_epochs` and `max_steps`; infinite without either."""
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
    if trainer.max_steps < 0:
        return epochs
    steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    return min(epochs, trainer.max_steps / steps)


def short_figures(metrics: dict, rename: bool = True) -> dict[str, str]:
    """Known metrics under their short names; PPO's joint loss says nothing and is left out."""
    names = SHORT_NAMES if rename else {name: name for name in metrics}
    hidden = {"train/loss", "train/perplexity"} if "rollout/reward" in metrics else set()
    shown = {short: float(metrics[name]) for name, short in names.items() if name in metrics and name not in hidden}
    return {short: f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}" for short, value in shown.items()}
