"""Alarms that watch every step: numbers that are not finite, data that do not come, steps that hang."""

import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..ranks import of_all_ranks
from .alarm import Action, Alarm, require
from .reproducer import Reproducer, last_checkpoint, plain, save_reproducer, trained_weights
from .rng_state import collect_state

FOLDER = "nonfinite"


class NonFiniteError(ValueError):
    """A loss or gradient is NaN or infinite, and `NonFiniteAlarm` was told to stop there."""


class NonFiniteAlarm(Alarm):
    """A NaN or an infinity in the loss or a gradient, noticed before the optimizer step that would spoil the weights.

    The first time, what is needed to compute the step again goes to `nonfinite/` in the run's folder: micro-batches,
    trained weights, generators, hyperparameters, and the names of the parameters; `load_reproducer` reads it. With
    action `stop` the step is not done and the fit ends in a `NonFiniteError`; with `warn` it goes on, spoilt or not.

    Looks once a step, at one number for all losses and gradients. Under `16-mixed` only losses count: infinite
    gradients are how the loss scaler finds its scale, and it leaves such steps out.

    Args:
        action: see `Alarm`.
    """

    meaning = "Such a step makes all weights NaN, and every later figure."
    remedy = "Replay it, and look for a learning rate that is too high, for float16, and for code of your own."

    def __init__(self, action: Action = "warn") -> None:
        super().__init__(action=action)
        self._batches: list[Any] = []  # micro-batches of the optimizer step, and what belongs to each
        self._rng: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        self._saved = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._saved = False
        self._begin_step()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin_step()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.action != "off":
            self._batches.append(batch)
            self._rng.append(collect_state())

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self.action != "off":
            self._losses.append(loss.detach())  # it is looked at with the gradients: that waits for a GPU only once

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.action == "off":
            return
        if any_rank(trainer, self._is_bad(trainer, pl_module)):
            self.check(trainer, self._describe(trainer, pl_module))
        else:
            self._raised = False
        self._begin_step()

    def _begin_step(self) -> None:
        self._batches, self._rng, self._losses = [], [], []

    def _is_bad(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        """A flag on the device."""
        numbers = [loss.float() for loss in self._losses]
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            numbers += largest_entries([gradient for _, gradient in gradients_of(pl_module)])
        if not numbers:
            return torch.tensor(False)
        return ~torch.stack(numbers).isfinite().all()

    def _describe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str | None:
        """What is not finite on this rank, and where its reproducer is. All ranks call it together."""
        losses = [float(loss) for loss in self._losses]
        names = [name for name, gradient in gradients_of(pl_module) if not gradient.isfinite().all()]
        where, bad = first_bad_loss(of_all_ranks(losses))
        place = self._reproducer(trainer, pl_module, losses, names, trainer.global_rank if bad is None else where)
        found = [] if bad is None else [f"the loss is {bad}" + f" on rank {where}" * (trainer.world_size > 1)]
        if names:
            found.append(f"{len(names)} gradients are not finite, first that of {names[0]}")
        return f"{' and '.join(found)}.{place}" if found else None

    def _reproducer(
        self, trainer: L.Trainer, pl_module: L.LightningModule, losses: list[float], names: list[str], where: int
    ) -> str:
        """Write it, once in a run; returns a sentence on where it is, on that rank which is to be looked at."""
        if self._saved:
            return ""
        self._saved = True
        kind, rank = type(pl_module), trainer.global_rank
        found = Reproducer(
            module_class=f"{kind.__module__}.{kind.__qualname__}",
            hparams=plain(dict(pl_module.hparams)),
            batches=plain(self._batches),
            losses=losses,
            rng=self._rng,
            gradients=names,
            rank=rank,
            iteration=trainer.current_epoch,
            step=trainer.global_step,
            precision=str(trainer.precision),
            checkpoint=last_checkpoint(trainer),
            weights=trained_weights(pl_module, keep=rank == 0),
        )
        folder = Path(trainer.default_root_dir) / FOLDER
        try:
            save_reproducer(folder, found)
        except OSError as error:
            return f" Its reproducer could not be written to {folder}: {error}."
        return f" Its reproducer is there: `load_reproducer({str(folder)!r}, rank={where})`."

    def act(self, trainer: L.Trainer, message: str) -> None:
        """Raise where the base class would let the step be done."""
        if self.action == "stop":
            raise NonFiniteError(message)
        super().act(trainer, message)


class StepTimeAlarm(Alarm):
    """Base of the alarms on time: takes the times of `window` batches, then judges them together.

    The first batch of an epoch has no waiting time, so that a rollout, a validation or new loader workers are none;
    nor has a batch that a checkpoint was saved before.

    Args:
        window: batches that are judged together. Ranks agree once a window, not in every step.
        min_seconds: shorter times are never bad.
        **kwargs: see `Alarm`.
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)
    """Seconds; a test has its own."""

    def __init__(self, window: int, min_seconds: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require("window", window >= 1, "at least 1", window)
        require("min_seconds", min_seconds >= 0, "at least 0", min_seconds)
        self.window, self.min_seconds = window, min_seconds
        self._times: list[tuple[float, float]] = []  # waiting, working
        self._wait = self._started = 0.0
        self._ended: float | None = None

    def judge(self, times: list[tuple[float, float]]) -> str | None:
        """What is wrong with a window of (seconds before, seconds in) batches, as a sentence; None if nothing is."""
        raise NotImplementedError

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._times, self._ended = [], None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started = self.clock()
        self._wait = 0.0 if self._ended is None else self._started - self._ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.action == "off":
            return
        self._times.append((self._wait, self.clock() - self._started))
        if len(self._times) == self.window:
            times, self._times = self._times, []
            self.check(trainer, self.judge(times))
        self._ended = self.clock()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = self.clock()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._ended = None


class StalledDataAlarm(StepTimeAlarm):
    """Training waits for its next batch.

    Args:
        share: of a window's time spent on waiting, above which it is bad.
        window: batches that are judged together.
        min_seconds: less waiting than this in a window is never bad.
        **kwargs: see `Alarm`.
    """

    meaning = "The loader, and what it reads from, is slower than the model."
    remedy = "Give the DataModule more `num_workers`, tokenise beforehand, or put the data on a nearer disk."

    def __init__(self, share: float = 0.5, window: int = 20, min_seconds: float = 5.0, **kwargs: Any) -> None:
        super().__init__(window, min_seconds, **kwargs)
        require("share", 0 < share < 1, "above 0 and below 1", share)
        self.share = share

    def judge(self, times: list[tuple[float, float]]) -> str | None:
        """Too large a share of waiting."""
        waiting, whole = sum(wait for wait, _ in times), sum(map(sum, times))
        if waiting <= self.min_seconds or waiting <= self.share * whole:
            return None
        return (
            f"{waiting:.3g} of {whole:.3g} seconds of {len(times)} batches were spent on waiting for them, "
            f"more than {self.share:.0%}."
        )


class SlowStepAlarm(StepTimeAlarm):
    """A training step takes many times as long as others do.

    The first window gives the usual time and is not judged: first steps compile, and find their kernels.

    Args:
        factor: so many times the median of the last 10 windows is bad.
        window: batches that are judged together, by the slowest of them.
        min_seconds: a step shorter than this is never bad.
        **kwargs: see `Alarm`.
    """

    meaning = "Something else uses the machine, memory is swapped, or one rank or its network hangs."
    remedy = "Look at the machine (nvidia-smi, top, the other ranks), and for a batch that is much longer than others."

    def __init__(self, factor: float = 5.0, window: int = 20, min_seconds: float = 2.0, **kwargs: Any) -> None:
        super().__init__(window, min_seconds, **kwargs)
        require("factor", factor > 1, "above 1", factor)
        self.factor = factor
        self._usual: deque[float] = deque(maxlen=10 * window)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._usual.clear()

    def judge(self, times: list[tuple[float, float]]) -> str | None:
        """The slowest step against the usual one."""
        steps = [work for _, work in times]
        usual, slowest = median(self._usual or [math.inf]), max(steps)
        self._usual.extend(steps)
        if slowest <= self.min_seconds or slowest <= self.factor * usual:
            return None
        return f"one of {len(steps)} batches took {slowest:.3g} s, above {self.factor:g} times the usual {usual:.3g} s."


def first_bad_loss(of_ranks: list[list[float]]) -> tuple[int, float | None]:
    """The first loss that is not finite and its rank; None of rank 0 if all are."""
    found = [(rank, loss) for rank, losses in enumerate(of_ranks) for loss in losses if not math.isfinite(loss)]
    return found[0] if found else (0, None)


def gradients_of(module: L.LightningModule) -> list[tuple[str, Tensor]]:
    """Names and gradients; of sharded ones this rank's part."""
    named = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    return [(name, g.to_local() if isinstance(g, DTensor) else g) for name, g in named]


def largest_entries(gradients: list[Tensor]) -> list[Tensor]:
    """The largest absolute entry of each tensor, which is NaN or infinite if one is; a norm could overflow."""
    full = [gradient for gradient in gradients if gradient.numel()]
    return [norm.float() for norm in torch._foreach_norm(full, float("inf"))] if full else []


def any_rank(trainer: L.Trainer, flag: Tensor) -> bool:
    """Whether a flag is set on any rank, with one wait for the device. All ranks must call it."""
    if trainer.world_size == 1:
        return bool(flag)
    count = flag.to(trainer.strategy.root_device, torch.float32)
    return bool(trainer.strategy.reduce(count, reduce_op="sum"))
