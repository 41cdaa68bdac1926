"""What all alarms share: when one is raised, who hears of it, and what happens then."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ..ranks import of_all_ranks
from ._shared import write_atomically

Action = Literal["off", "warn", "stop"]
FILENAME = "alarms.jsonl"


class AlarmWarning(UserWarning):
    """What an alarm says; a category of its own, so that Python's warning filters can tell it from other warnings."""


class Alarm(L.Callback):
    """Base of the alarms: a condition, and what to do when it holds.

    A subclass judges an evaluation and hands the verdict to `check`. When `patience` evaluations in a row were bad, the
    alarm is raised: a warning, a line in `alarms.jsonl` in the run's folder, and an alert where a W&B run is online.
    While the condition persists it is quiet; when the condition has gone and comes back, it is raised again.

    An alarm only watches: it draws no random numbers and changes no gradient and no parameter.

    Args:
        action: `off` does nothing, `warn` tells, `stop` tells and ends the training, on all ranks alike and in order:
            the checkpoint and what other callbacks write at the end are there. A resumed run stops again if the
            condition still holds.
        patience: so many evaluations in a row must be bad.
    """

    meaning = ""
    """What the condition usually means, one sentence."""
    remedy = ""
    """What to do first, one sentence."""

    def __init__(self, action: Action = "warn", patience: int = 1) -> None:
        require("action", action in get_args(Action), f"one of {list(get_args(Action))}", action)
        require("patience", patience >= 1, "at least 1", patience)
        self.action, self.patience = action, patience
        self._forget()

    def _forget(self) -> None:
        self.memory: dict[str, Any] = {}  # what a subclass keeps over a resume: plain numbers and lists of them
        self._bad = 0  # evaluations in a row
        self._raised = False

    # --- judging ------------------------------------------------------------------------------------------------------

    def check(self, trainer: L.Trainer, seen: str | None) -> None:
        """Take the verdict on one evaluation: what was seen, as a sentence, or None if all is well.

        All ranks must call it. One bad rank is enough, and all ranks take the same decision.
        """
        bad = trainer.strategy.reduce_boolean_decision(seen is not None, all=False)
        self._bad = self._bad + 1 if bad else 0
        self._raised = self._raised and bad
        if self._bad >= self.patience and not self._raised:
            self._raised = True
            self._raise(trainer, first_sentence(of_all_ranks(seen)))

    def _raise(self, trainer: L.Trainer, seen: str) -> None:
        place = f"iteration {trainer.current_epoch}, step {trainer.global_step}"
        message = " ".join(filter(None, [f"{type(self).__name__} at {place}: {seen}", self.meaning, self.remedy]))
        if trainer.is_global_zero:
            self._write(trainer, message)
            self._alert(trainer, message)
        self.act(trainer, message)

    def act(self, trainer: L.Trainer, message: str) -> None:
        """What the alarm does in the run, on every rank."""
        if self.action == "stop":
            trainer.should_stop = True
            message += " The run stops here (action: stop)."
        rank_zero_warn(message, category=AlarmWarning)

    # --- telling ------------------------------------------------------------------------------------------------------

    def _write(self, trainer: L.Trainer, message: str) -> None:
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "iteration": trainer.current_epoch,
            "step": trainer.global_step,
            "alarm": type(self).__name__,
            "message": message,
            "action": self.action,
        }
        path = Path(trainer.default_root_dir) / FILENAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            rank_zero_warn(f"The alarm could not be written to {path}: {error}")

    def _alert(self, trainer: L.Trainer, message: str) -> None:
        level = "ERROR" if self.action == "stop" else "WARN"
        for logger in trainer.loggers:
            try:
                if isinstance(logger, WandbLogger) and not logger.experiment.offline:
                    logger.experiment.alert(title=type(self).__name__, text=message, level=level)
            except Exception as error:  # whatever a service does, the run goes on
                rank_zero_warn(f"The alarm could not be sent to Weights & Biases: {error}")

    # --- beginning and going on -------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget()  # a state from a checkpoint comes later

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.action != "off" and trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / FILENAME
            try:
                forget_later(path, type(self).__name__, trainer.global_step)
            except OSError as error:
                rank_zero_warn(f"Alarms of an earlier run stay in {path}: {error}")

    def state_dict(self) -> dict[str, Any]:
        if self.action == "off":
            return {}
        return {"bad": self._bad, "raised": self._raised, "memory": self.memory}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.memory, self._bad = state_dict["memory"], state_dict["bad"]
        self._raised = state_dict["raised"] and self.action != "stop"


class MetricAlarm(Alarm):
    """Base of the alarms that watch one logged figure, once an iteration (an epoch). Where it is not logged, nothing.

    A NaN is bad whatever the threshold is.
    """

    metric = ""
    """Name of the figure in `trainer.callback_metrics`."""

    def judge(self, value: float) -> str | None:
        """What is wrong with the new value, as a sentence; None if nothing is."""
        raise NotImplementedError

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.action == "off":
            return
        logged = trainer.callback_metrics.get(self.metric)  # on all ranks: reading may reduce over them
        if logged is not None:
            value = float(logged)
            self.check(trainer, f"{self.metric} is NaN." if value != value else self.judge(value))


def first_sentence(of_ranks: list[str | None]) -> str:
    """What the first rank says that has something to say; which one, if it is not rank zero."""
    rank, seen = next((rank, seen) for rank, seen in enumerate(of_ranks) if seen is not None)
    return f"on rank {rank}, {seen}" if rank else seen


def forget_later(path: Path, alarm: str, step: int) -> None:
    """Drop an alarm's lines from after a step: those of a run that is begun anew, or goes on from a checkpoint."""
    if not path.exists():
        return
    text, kept = path.read_text(encoding="utf-8"), ""
    for line in text.splitlines():
        record = _record(line)
        if record and (record["alarm"] != alarm or 0 < step >= record["step"]):
            kept += f"{line}\n"
    if kept != text:
        write_atomically(path, kept)


def _record(line: str) -> dict[str, Any] | None:
    """What a line holds; None of one that a crash has spoilt."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and {"alarm", "step"} <= record.keys() else None


def require(name: str, holds: bool, expected: str, got: object) -> None:
    """ValueError that names the argument, what was expected and what came."""
    if not holds:
        raise ValueError(f"`{name}` must be {expected}, but got {got!r}.")
