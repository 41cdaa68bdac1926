"""Logged means and extremes over an epoch: exact over batches and ranks, and a resume within the epoch keeps them."""

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ..functional import masked_sum


class Mean(Metric):
    """The mean of all items seen; sum and count stay apart, so batches of unequal size count as they should.

    torchmetrics' own takes weights, but drops them without a word when its NaN check is off; and the check drops NaN.
    """

    reduce_op = "sum"  # how the ranks' states become one

    def __init__(self) -> None:
        super().__init__()
        self.add_state("state", torch.zeros(2, dtype=torch.float64), dist_reduce_fx=self.reduce_op)

    def update(self, total: Tensor, count: Tensor) -> None:
        """Add `count` items that sum to `total`, both scalars."""
        self.state = self.state + torch.stack([total.detach().double(), count.double()])

    def compute(self) -> Tensor:
        """The mean so far; NaN of nothing."""
        total, count = self.state
        return (total / count).float()

    def resume(self, state: Tensor, rank: int) -> None:
        """Go on from the state of all ranks together."""
        self.update(*(state * (rank == 0)))


class Largest(Metric):
    """The largest of all values seen; −∞ of nothing."""

    empty = -math.inf
    reduce_op = "max"

    def __init__(self) -> None:
        super().__init__()
        self.add_state("state", torch.full((1,), self.empty, dtype=torch.float64), dist_reduce_fx=self.reduce_op)

    def update(self, values: Tensor) -> None:
        """Add values of any shape."""
        self.state = self.best(torch.cat([self.state, values.detach().double().flatten()]))[None]

    def best(self, values: Tensor) -> Tensor:
        """The one that counts."""
        return values.max()

    def compute(self) -> Tensor:
        """The largest so far."""
        return self.state[0].float()

    def resume(self, state: Tensor, rank: int) -> None:
        """Go on from the state of all ranks together."""
        self.update(state)


class Smallest(Largest):
    """The smallest of all values seen; ∞ of nothing."""

    empty = math.inf
    reduce_op = "min"

    def best(self, values: Tensor) -> Tensor:
        """The one that counts."""
        return values.min()


class RunningFigures(L.LightningModule):
    """A LightningModule that logs such means and extremes."""

    def __init__(self) -> None:
        super().__init__()
        self._running = nn.ModuleDict()  # of this epoch, by their names
        self._resumed_running: dict[str, tuple[str, list[float]]] = {}

    def log_mean(self, name: str, values: Tensor, mask: Tensor | None = None, **kwargs: Any) -> None:
        """Log the mean over the True entries of the mask, exact over batches and ranks: sum and count stay apart."""
        mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
        total, count = masked_sum(values.detach(), mask), mask.sum()
        self._log_running(Mean, name, lambda mean: mean.update(total, count), **kwargs)

    def log_range(self, name: str, values: Tensor, **kwargs: Any) -> None:
        """Log the smallest and the largest of the values as `name_min` and `name_max`, over batches and ranks."""
        for kind, end in ((Smallest, "min"), (Largest, "max")):
            self._log_running(kind, f"{name}_{end}", lambda metric: metric.update(values), **kwargs)

    def log_largest(self, name: str, values: Tensor, **kwargs: Any) -> None:
        """Log the largest of the values, over batches and ranks."""
        self._log_running(Largest, name, lambda metric: metric.update(values), **kwargs)

    def _log_running(self, kind: type[Metric], name: str, change: Callable[[Metric], None], **kwargs: Any) -> None:
        if name not in self._running:
            self._running[name] = kind().to(self.device)
        change(self._running[name])
        # Lightning looks up a metric's name only once; this one may be younger than that.
        attribute = f"_running.{name}"
        self.log(name, self._running[name], on_step=False, on_epoch=True, metric_attribute=attribute, **kwargs)

    def over_ranks(self, values: Tensor, how: str) -> Tensor:
        """A tensor reduced over all ranks, by `sum`, `max` or `min`; the tensor itself in one process."""
        if self.trainer.world_size == 1:
            return values
        return self.trainer.strategy.reduce(values.clone(), reduce_op=how)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks."""
        return self.over_ranks(values, "sum")

    def running_state(self) -> dict[str, tuple[str, list[float]]]:
        """The epoch's figures so far, of all ranks, by their names."""
        return {
            name: (type(metric).__name__, self.over_ranks(metric.state, metric.reduce_op).tolist())
            for name, metric in self._running.items()
            if metric.update_called
        }

    def resume_running(self) -> None:
        """Go on with the figures of the epoch that a stopped run began."""
        kinds = {kind.__name__: kind for kind in (Mean, Largest, Smallest)}
        for name, (kind, values) in self._resumed_running.items():
            state = torch.tensor(values, dtype=torch.float64, device=self.device)
            self._log_running(kinds[kind], name, lambda m, state=state: m.resume(state, self.global_rank), batch_size=1)
        self._resumed_running = {}
