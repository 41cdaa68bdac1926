"""Lightning's ModelCheckpoint, with a last checkpoint that is the last one, and a best one that was measured."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from ._shared import ends_epoch


class RunCheckpoint(ModelCheckpoint):
    """ModelCheckpoint with four differences. Its arguments are the same.

    1. With a `monitor` and `save_last: true`, `last.ckpt` is written at every epoch (or validation) that
       `every_n_epochs` names. Lightning writes it only where the monitored value was among the best, so that a resumed
       run would start from the best epoch instead of the last.
    2. A monitor `val/...` counts only at an epoch that was validated. Elsewhere Lightning finds the value of an earlier
       epoch, and keeps a model under it that was not measured; or it finds none, and stops the run.
    3. With `save_last: true`, `last.ckpt` is written at the end of training if the last step has none, as with
       `every_n_train_steps: 100` and 150 steps. Lightning does so only if it has written none at all.
    4. What is due at an epoch's last step or its validation is written when the epoch has ended and loggers have its
       figures. A run that resumes from there begins the next epoch: killed in between, it would lack them.
    """

    _validated_at = -1  # the global step
    _waiting: tuple[Callable[[], None], ...] = ()
    """What is to be done when the epoch has its figures."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_epoch(trainer):
            step_end = super().on_train_batch_end
            self._waiting = (lambda: step_end(trainer, pl_module, None, None, batch_idx),)
        else:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated_at = trainer.global_step
        if trainer.state.fn == "fit" and not trainer.sanity_checking and ends_epoch(trainer):
            self._waiting += (lambda: self._save_validated(trainer, pl_module),)
        else:
            self._save_validated(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        log_epoch(trainer)
        for save in self._waiting:
            save()
        self._waiting = ()
        if not self._is_unmeasured(trainer):
            super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._keep_last(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.save_last is True and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_validated(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._keep_last(trainer)

    def _is_unmeasured(self, trainer: L.Trainer) -> bool:
        return (self.monitor or "").startswith("val/") and self._validated_at != trainer.global_step

    def _keep_last(self, trainer: L.Trainer) -> None:
        due = self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if due and self.save_last is True and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def log_epoch(trainer: L.Trainer) -> None:
    """Give loggers the epoch's figures at once. Lightning would after all callbacks; it then finds none left."""
    connector, steps = trainer._logger_connector, trainer.fit_loop.epoch_loop
    connector.on_epoch_end()
    steps._batches_that_stepped -= 1  # as Lightning does: the line has the number of the last step
    connector.update_train_epoch_metrics()
    steps._batches_that_stepped += 1
