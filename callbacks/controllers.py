"""Callbacks that steer a run: the reference follows the policy, the entropy is held up, the weights are averaged.

Unlike the other callbacks they change what is learned. Each sets a documented attribute of the module, at a moment from
which a checkpoint can go on: whatever a run is stopped at, resumed it does what it would have done. docs/controllers.md
says when to use which.
"""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..strategies import placed_like


class ReferenceRefresh(L.Callback):
    """Move the reference to where the policy is, every so often: what KL and DPO's rewards are measured from.

    reference ← (1 − w) · reference + w · policy,  before an epoch (or a step) whose number the period divides

    With w = 1 the reference becomes the policy. With LoRA only w = 1 is possible; the reference is then a second
    adapter, frozen. A checkpoint holds the reference once it was refreshed: the adapter, or the whole network.

    Source: Gorbatovski et al. 2024, "Learn Your Reference Model for Real Good Alignment" (TR-DPO),
    https://arxiv.org/abs/2404.09656.

    Args:
        every_n_epochs: for on-policy methods: iterations between two refreshes. Usual: 10 to 100.
        weight: w, above 0 and at most 1.
        every_n_steps: for DPO and its relatives: optimizer steps between two refreshes, in place of `every_n_epochs`.
            TR-DPO: some hundreds with w = 1, few with w about 0.6.
    """

    def __init__(
        self, every_n_epochs: int | None = None, weight: float = 1.0, every_n_steps: int | None = None
    ) -> None:
        if (every_n_epochs is None) == (every_n_steps is None):
            raise ValueError(
                f"`every_n_epochs` or `every_n_steps` must be given, and not both, but got {every_n_epochs} and "
                f"{every_n_steps}."
            )
        name, period = (
            ("every_n_epochs", every_n_epochs) if every_n_epochs is not None else ("every_n_steps", every_n_steps)
        )
        _require(name, period >= 1, "at least 1", period)
        _require("weight", 0 < weight <= 1, "above 0 and at most 1", weight)
        self.every_n_epochs, self.every_n_steps, self.weight = every_n_epochs, every_n_steps, weight
        self._last = 0  # the epoch or step of the last refresh

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and pl_module.hparams.get("reference_cache") is not None:
            raise ValueError(
                "`reference_cache` keeps what one reference says, but `ReferenceRefresh` changes it: use one of them."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if getattr(pl_module, "reference", None) is None:
            raise ValueError(
                f"`ReferenceRefresh` needs a module with a reference, but this {_name(pl_module)} has none."
            )
        pl_module.reference.check(self.weight)

    # At the start and not at the end of what comes before: a run that is stopped behind an epoch's last batch never
    # comes to that epoch's end.

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_epochs:
            self._refresh_if_due(pl_module, trainer.current_epoch, self.every_n_epochs)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps:
            self._refresh_if_due(pl_module, trainer.global_step, self.every_n_steps)

    def _refresh_if_due(self, pl_module: L.LightningModule, number: int, period: int) -> None:
        if number > self._last and number % period == 0:
            pl_module.reference.refresh(self.weight)
            self._last = number

    def state_dict(self) -> dict[str, Any]:
        # Lightning warns of a resumed run that lacks a callback whose state is in the checkpoint.
        return {"last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last = state_dict["last"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        reference = pl_module.reference
        checkpoint["refreshed_reference"] = {"tensors": reference.state(), "refreshes": reference.refreshes}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if saved := checkpoint.get("refreshed_reference"):
            pl_module.reference.load_state(saved["tensors"], saved["refreshes"])


class EntropyTarget(L.Callback):
    """Hold the policy's entropy up: dual ascent on the weight of the entropy bonus of PPO and GRPO.

    entropy_coef ← min(max(entropy_coef + step_size · (target − H), 0), max_coef),  once an iteration,

    with H the entropy of the rollout, nats per token, a mean over all response tokens of all ranks: `rollout/entropy`.
    At H < target the bonus grows, at H > target it shrinks; at 0 the constraint H ≥ target costs nothing. It starts at
    the module's `entropy_coef`.

    Source: the temperature of SAC, Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905, section 5; for language
    models Skywork-OR1 (He et al. 2025, https://arxiv.org/abs/2505.22312).

    Args:
        target: nats per token. Usual: a quarter to a half of `rollout/entropy` in the first iteration.
        step_size: change of the coefficient per nat. Usual: 1e-4 to 1e-2.
        max_coef: the largest coefficient. A large bonus makes noise of a policy.
    """

    def __init__(self, target: float, step_size: float = 1e-3, max_coef: float = 0.1) -> None:
        _require("target", target > 0, "above 0", target)
        _require("step_size", step_size > 0, "above 0", step_size)
        _require("max_coef", max_coef > 0, "above 0", max_coef)
        self.target, self.step_size, self.max_coef = target, step_size, max_coef

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not hasattr(pl_module, "entropy_coef"):
            raise ValueError(f"`EntropyTarget` needs PPO or GRPO, which have an entropy bonus, not {_name(pl_module)}.")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Between the rollout and its first update; a run that goes on within an iteration has done it.
        if batch_idx > 0:
            return
        error = self.target - mean_entropy(pl_module)
        pl_module.entropy_coef = min(max(pl_module.entropy_coef + self.step_size * error, 0.0), self.max_coef)


def mean_entropy(pl_module: L.LightningModule) -> float:
    """Mean entropy of the last rollout over the response tokens of all ranks, nats; all ranks must call it."""
    entropy, mask = (pl_module.per_token[name].double() for name in ("entropy", "mask"))
    sums = torch.stack([(entropy * mask).sum(), mask.sum()])
    total, count = pl_module.sum_over_ranks(sums.to(pl_module.device)).tolist()
    return total / max(count, 1)


class EMAWeights(L.Callback):
    """Average the trained weights over the steps; validation, export and the run's result use the average.

    average ← decay · average + (1 − decay) · weights,  after every optimizer step; it starts at the first weights.

    It looks back over about 1 / (1 − decay) steps. Rollouts and updates use the weights themselves. In a checkpoint
    `state_dict` is the average, and what is trained is beside it, to go on from. The average is float32.

    Lightning's own EMAWeightAveraging copies the whole module, frozen networks and all, and takes no sharded ones; this
    holds what is trained, and each rank its shards of it.

    Source: Polyak and Juditsky 1992; for RLHF policies WARP, Ramé et al. 2024, https://arxiv.org/abs/2406.16768.

    Args:
        decay: at least 0 and below 1. Usual: 0.99 to 0.999; 1 / (1 − decay) well below the number of steps.
    """

    def __init__(self, decay: float = 0.999) -> None:
        _require("decay", 0 <= decay < 1, "at least 0 and below 1", decay)
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        """By the names of the trained parameters."""
        self._trained: dict[str, Tensor] = {}  # while the module holds the average: what it would hold else
        self._step = 0
        self._resumed: dict[str, Any] | None = None

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        saved, self._resumed = self._resumed, None
        start = dict(_trained(pl_module)) if saved is None else saved["average"]
        named = dict(_trained(pl_module))
        self.average = {
            name: placed_like(start[name], p).to(p.device, torch.float32, copy=True) for name, p in named.items()
        }
        self._trained, self._step = {}, trainer.global_step
        if saved is not None:  # the module holds the average, as it was the checkpoint's `state_dict`
            trainer.strategy.load_model_state_dict({"state_dict": saved["trained"]}, strict=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._follow(trainer, pl_module)

    @torch.no_grad()
    def _follow(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        for name, parameter in _trained(pl_module):
            self.average[name].mul_(self.decay).add_(parameter, alpha=1 - self.decay)

    # --- the module with the average in it ----------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._take_average(pl_module)

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            for name, parameter in _trained(pl_module):
                parameter.copy_(self._trained[name])
            self._trained = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take_average(pl_module)

    @torch.no_grad()
    def _take_average(self, pl_module: L.LightningModule) -> None:
        self._trained = {name: parameter.detach().clone() for name, parameter in _trained(pl_module)}
        for name, parameter in _trained(pl_module):
            parameter.copy_(self.average[name])

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self.average:
            return  # nothing was trained
        self._follow(trainer, pl_module)  # callbacks before this one may save after a step, too
        state, first, named = checkpoint["state_dict"], trainer.is_global_zero, dict(_trained(pl_module))
        trained = {name: _whole(self._trained.get(name, p.detach())) for name, p in named.items()}
        exact = {name: _whole(self.average[name]) for name, p in named.items() if p.dtype != torch.float32}
        checkpoint["ema"] = {"trained": _on_cpu(trained) if first else {}, "average": _on_cpu(exact) if first else {}}
        names = {parameter: name for name, parameter in named.items()}
        for name, parameter in pl_module.named_parameters(remove_duplicate=False):
            if parameter in names:
                average = self.average[names[parameter]].to(parameter.dtype)
                # As the strategy writes it: sharded where it is, else whole.
                state[name] = average if isinstance(state[name], DTensor) else _whole(average)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        if "ema" not in checkpoint:
            raise ValueError("`EMAWeights`: the checkpoint holds no average, as its run had no `EMAWeights`.")
        average = {name: checkpoint["state_dict"][name] for name in checkpoint["ema"]["trained"]}
        self._resumed = checkpoint["ema"] | {"average": average | checkpoint["ema"]["average"]}


def _trained(pl_module: L.LightningModule) -> Iterator[tuple[str, Tensor]]:
    """What is trained, by name."""
    return ((name, parameter) for name, parameter in pl_module.named_parameters() if parameter.requires_grad)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _name(pl_module: L.LightningModule) -> str:
    return type(pl_module).__name__


def _require(name: str, holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {expected}, but got {got!r}.")
