"""Lightning's progress bar with the figures that matter."""

import sys

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from ._shared import final_metrics

# Logged name -> what the bar calls it, in the order shown.
SHORT_NAMES = {
    "rollout/reward": "reward",
    "rollout/kl": "kl",
    "policy/clip_fraction": "clip",
    "throughput/tokens_per_second": "tok/s",
    "train/loss": "loss",
    "train/perplexity": "ppl",
    "val/perplexity": "val ppl",
    "val/agreement": "agreement",
}


class ProgressBar(TQDMProgressBar):
    """A progress bar that shows few figures under short names, and no version number.

    PPO: reward, KL, clip fraction, tokens per second. Fine-tuning: loss and perplexity. Reward models: loss and
    agreement. Where the output is not a terminal (a log file, CI) there is no bar but one plain line per epoch.

    Args:
        refresh_rate: batches between two updates of the bar; 0 turns it off.
        leave: keep the finished bar of every epoch on the screen.
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        self._plain = not sys.stdout.isatty()
        super().__init__(refresh_rate=0 if self._plain else refresh_rate, leave=leave)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, str]:
        """What the bar shows; a module with none of the known names shows what it logged with `prog_bar=True`."""
        return short_figures(trainer.callback_metrics) or short_figures(trainer.progress_bar_metrics, rename=False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        final_metrics(trainer)  # read on all ranks, as reading may reduce over them; the bar itself reads on rank zero
        super().on_train_epoch_end(trainer, pl_module)
        if self._plain and trainer.is_global_zero:
            figures = ", ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
            print(f"epoch {trainer.current_epoch}: {figures}", flush=True)


def short_figures(metrics: dict, rename: bool = True) -> dict[str, str]:
    """Known metrics under their short names; PPO's joint loss says nothing and is left out."""
    names = SHORT_NAMES if rename else {name: name for name in metrics}
    hidden = {"train/loss", "train/perplexity"} if "rollout/reward" in metrics else set()
    shown = {short: float(metrics[name]) for name, short in names.items() if name in metrics and name not in hidden}
    return {short: f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}" for short, value in shown.items()}
