"""SIGTERM, and SLURM's signal before the end of a job: finish the step, save, stop; the run can go on from there."""

import os
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ._shared import ends_epoch
from .checkpoint import log_epoch


class Preemption(L.Callback):
    """Save a checkpoint and stop when the process is told to end.

    SIGTERM is what schedulers, containers and `kill` send. The signal is noted, and after the optimizer step all ranks
    write `last.ckpt` to the folder of the (first) ModelCheckpoint and exit with code 143; `--ckpt_path last` goes on
    with the next batch. In the last step of an epoch and during validation the end of these comes first, since a
    resumed run would leave them out; in the last step of all, the run just comes to its end.

    In a SLURM job (and unless SLURMEnvironment(auto_requeue=False) is among the plugins) the checkpoint is also written
    to where Lightning looks by itself, `hpc_ckpt_<n>.ckpt` in `default_root_dir`. On the requeue signal, SIGUSR1 by
    default (`#SBATCH --signal=SIGUSR1@120`), the job is put back into the queue, and the run goes on when it starts
    again.

    Lightning's own handlers, which this one replaces while it trains, start a collective or write the checkpoint at
    the very moment of the signal, for instance in a backward pass; with several ranks that can hang.
    """

    def __init__(self) -> None:
        self._worker = _SaveAndStop()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # The work is a checkpoint callback's: those Lightning calls last, after all that belongs into a checkpoint has
        # changed. It is in the list for a fit only: elsewhere Lightning takes it for a second ModelCheckpoint.
        if stage == "fit" and self._worker not in trainer.callbacks:
            trainer.callbacks.append(self._worker)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._worker in trainer.callbacks:
            trainer.callbacks.remove(self._worker)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


class _SaveAndStop(Checkpoint):
    """Notes a signal when it comes, and obeys where all ranks meet."""

    def __init__(self) -> None:
        self._signals: list[int] = []
        self._noted = 0  # number of a signal in the list, from 1
        self._launcher: Any = None
        self._steps = 0
        self._stepped = True

    # --- the signal ---------------------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen(trainer)
        self._steps, self._stepped = trainer.global_step, True

    def _listen(self, trainer: L.Trainer) -> None:
        """Take the place of Lightning's handlers; at the end of the fit Lightning puts back what was before them."""
        if self._signals and signal.getsignal(self._signals[0]) == self._note:
            return
        self._noted, self._launcher = 0, trainer.strategy.launcher
        environment = slurm_environment(trainer)
        self._signals = [signal.SIGTERM] if environment is None else [signal.SIGTERM, environment.requeue_signal]
        if threading.current_thread() is threading.main_thread():
            for signum in self._signals:
                signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # The requeue signal wins: SLURM lets SIGTERM follow it.
        self._noted = max(self._noted, self._signals.index(signum) + 1)
        if isinstance(self._launcher, _SubprocessScriptLauncher):
            self._launcher.kill(signum)

    # --- the places from which a resumed run continues exactly --------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not between micro-batches: gradients are in no checkpoint.
        self._stepped, self._steps = trainer.global_step != self._steps, trainer.global_step
        validates = trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        if self._stepped and not validates and not ends_epoch(trainer) and (number := self._agreed(trainer)):
            trainer._logger_connector.update_train_step_metrics()  # which Lightning does only after this hook
            self._obey(trainer, number)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        possible = self._stepped and not trainer.sanity_checking and not ends_epoch(trainer)
        if possible and (number := self._agreed(trainer)):
            self._obey(trainer, number)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not is_finished(trainer) and (number := self._agreed(trainer)):
            log_epoch(trainer)  # which Lightning does only after this hook
            self._obey(trainer, number)

    def _agreed(self, trainer: L.Trainer) -> int:
        """The largest number of a signal that a rank has noted. All ranks must call it."""
        if trainer.world_size == 1:
            return self._noted
        tensor = torch.tensor(self._noted, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(tensor, reduce_op="max"))

    def _obey(self, trainer: L.Trainer, number: int) -> None:
        """Save and leave, on all ranks together."""
        paths = [last_checkpoint(trainer)]
        if slurm_environment(trainer) is not None:
            path = trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)
            paths.append(trainer.strategy.broadcast(path))
        for path in paths:
            trainer.save_checkpoint(path, weights_only=False)
        signum = signal.Signals(self._signals[number - 1])
        further = requeue(trainer) if number == 2 else f"Go on with the same command and --ckpt_path {paths[0]}"
        place = f"step {trainer.global_step}, epoch {trainer.current_epoch}"
        rank_zero_info(f"\n{signum.name}: stopped at {place}; saved {' and '.join(paths)}. {further}")
        leave(trainer, 128 + signum)


def slurm_environment(trainer: L.Trainer) -> SLURMEnvironment | None:
    """The SLURM job that this process belongs to, if it is one to be requeued."""
    environment = trainer._accelerator_connector.cluster_environment
    return environment if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None


def is_finished(trainer: L.Trainer) -> bool:
    """Whether the epoch that ends is the last one: what is left to do is quick, and a resumed run would not do it."""
    last_epoch = trainer.current_epoch + 1 >= (trainer.max_epochs or -1) >= 0
    return last_epoch or trainer.global_step >= trainer.max_steps >= 0 or trainer.should_stop


def last_checkpoint(trainer: L.Trainer) -> str:
    """Where the ModelCheckpoint keeps its last checkpoint; last.ckpt, and as there, no file of an earlier run."""
    keepers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    if not keepers:
        return os.path.join(trainer.default_root_dir, "checkpoints", "last.ckpt")
    keeper, version = keepers[0], 0
    if not keeper.last_model_path:
        path = os.path.join(keeper.dirpath, "last.ckpt")
        while keeper.file_exists(path, trainer):
            version += 1
            path = os.path.join(keeper.dirpath, f"last-v{version}.ckpt")
        keeper.last_model_path = path  # it is saved with the rest: the resumed run replaces this file
    elif trainer.is_global_zero and os.path.islink(keeper.last_model_path):
        os.unlink(keeper.last_model_path)  # not to write to the checkpoint that `save_last="link"` points to
    return keeper.last_model_path


def requeue(trainer: L.Trainer) -> str:
    """Put the SLURM job back into the queue; returns what is to be said of it."""
    if not trainer.is_global_zero:
        return ""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{error}: submit the job again, and it goes on."
    return f"Job {job} is in the queue again and will go on by itself."


def leave(trainer: L.Trainer, code: int) -> None:
    """End the process with this exit code, by way of Lightning's teardown."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.save_on_exception = False  # it would save the same once more
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        # Lightning's observer of the other ranks would take their exit code for a crash, and kill this process.
        trainer.strategy.launcher.procs.clear()
    raise SIGTERMException(code)
