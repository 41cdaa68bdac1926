"""The run's page, report.html, while it runs and when it has ended."""

import json
import time
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ..report import outcome, write_report
from ..report.run import is_run, json_object
from ..report.scorecard import Targets
from ._shared import write_atomically

_SHARE_OF_TIME = 0.05  # of a run's time that reports may take before its end
_clock = time.monotonic


class RunReport(L.Callback):
    """Write `report.html` into the run's folder: figures, curves, samples, alarms, config and provenance on one page.

    It is made from the files in the trainer's `default_root_dir` alone, so put this callback after those that write
    them. What a file is missing for is left out, and the page says so. It is written when the fit ends, also by an
    exception, and after validations, as often as that costs no more than a twentieth of the time. A report that
    cannot be written is a warning. `lightning_rlhf.report.write_report(folder)` makes the same page afterwards.

    Goals are judged if they are given a number here. They compare the held-out responses of the first evaluation with
    those of the last; `num_sanity_val_steps: -1` makes the first one that before training. They are kept in
    `goals.json` beside the report.

    Args:
        filename: name of the page.
        min_reward_gain: goal: by how much the mean held-out reward rises, in standard deviations. Judged on the smaller
            of two readings: the plain difference (the reward model's normaliser gives reference texts a standard
            deviation of 1) and the difference divided by the standard deviation of the samples before.
        gold: goal: name of a reward component that training does not optimise, such as "reward/vader", which rises.
        min_gold_gain: by how much the mean gold score rises.
        max_kl: goal: upper bound of the mean sequence KL to the reference after training, in nats.
        min_unique: goal: smallest share of different responses.
        min_distinct_share: goal: smallest share of its value before that distinct-2 keeps.
        reward_model_metrics: goal: path of the `summary.json` that `StageSummary` wrote in the reward model's stage,
            whose agreement with held-out pairs is high enough.
        min_agreement: smallest agreement of that reward model.
    """

    def __init__(
        self,
        filename: str = "report.html",
        min_reward_gain: float | None = None,
        gold: str | None = None,
        min_gold_gain: float = 0.3,
        max_kl: float | None = None,
        min_unique: float | None = None,
        min_distinct_share: float | None = None,
        reward_model_metrics: str | None = None,
        min_agreement: float = 0.79,
    ) -> None:
        if Path(filename).name != filename:
            raise ValueError(f"`filename` must be a plain name in the run's folder, but is {filename!r}.")
        self.filename = filename
        self.reward_model_metrics = reward_model_metrics
        self.targets = Targets(
            min_reward_gain,
            gold,
            min_gold_gain,
            max_kl,
            min_unique,
            min_distinct_share,
            min_agreement=None if reward_model_metrics is None else min_agreement,
        )
        self._written, self._cost = float("-inf"), 0.0  # when the last report was done, and how long it took

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        targets = self.targets._replace(agreement=self._agreement())
        path = Path(trainer.default_root_dir) / "goals.json"
        try:
            if targets._replace(min_gold_gain=Targets().min_gold_gain) == Targets():  # nothing is asked for
                path.unlink(missing_ok=True)  # of an earlier run in the folder
            else:
                asked = {name: value for name, value in targets._asdict().items() if value is not None}
                write_atomically(path, json.dumps(asked, indent=2) + "\n")
        except OSError as error:
            rank_zero_warn(f"The goals cannot be kept in {path}: {error}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if _clock() - self._written >= self._cost / _SHARE_OF_TIME:
            self._write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == "fit" and is_run(Path(trainer.default_root_dir)):  # else it failed before it began
            self._write(trainer)

    # In `teardown`, the last hook, so that the files of all callbacks before this one are there.
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and (path := self._write(trainer)):
            print(f"{outcome(path.parent)} Report: {path}".lstrip())

    def _write(self, trainer: L.Trainer) -> Path | None:
        """The page's path; None where it could not be written, and on other ranks."""
        if not trainer.is_global_zero:
            return None
        started = _clock()
        try:
            for logger in trainer.loggers:
                if isinstance(logger, CSVLogger):
                    logger.save()  # it keeps back up to a hundred rows
            return write_report(trainer.default_root_dir, self.filename)
        except Exception as error:  # whatever it is: the run is worth more than its report
            rank_zero_warn(f"The report could not be written: {type(error).__name__}: {error}")
            return None
        finally:
            self._written = _clock()
            self._cost = self._written - started

    def _agreement(self) -> float | None:
        if self.reward_model_metrics is None:
            return None
        metrics = json_object(Path(self.reward_model_metrics))
        found = [metrics.get(f"{split}/agreement") for split in ("test", "val")]
        return next((value for value in found if value is not None), None)
