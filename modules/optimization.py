"""One optimizer, its schedule, and a loss that is a *global* mean."""

import math
from typing import Any

import torch
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from transformers import get_scheduler

from .running import RunningFigures
from .sharding import global_norm


class MeanLossModule(RunningFigures):
    """Base of `TextModule`: AdamW, and gradients of means over all items of a whole optimizer step.

    `training_step` returns a sum and counts its items (`mean_loss`); before the step the gradient is divided once, by
    the count over all micro-batches and ranks. So `accumulate_grad_batches`, the number of ranks and the order of the
    data change no update, however unequal the lengths are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loss: Tensor | float = 0.0  # sum and count since the last optimizer step
        self._to_mean = 1.0  # from the summed gradient to that of the mean
        self._norms: list[Tensor] = []  # of the optimizer's groups, after that

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups; a subclass with several learning rates names them here."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "name": "train"}]

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW and a learning-rate schedule over the optimizer steps of the run."""
        hparams = self.hparams
        # A fused optimizer would take loss scaling's place in undoing it, and then gradients cannot be looked at.
        is_scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer = torch.optim.AdamW(
            self.parameter_groups(),
            lr=hparams.learning_rate,
            weight_decay=hparams.weight_decay,
            eps=hparams.adam_eps,
            fused=hparams.fused_optimizer and not is_scaled,
        )
        steps = self.trainer.estimated_stepping_batches
        if hparams.lr_scheduler != "constant" and not math.isfinite(steps):
            raise ValueError(
                f"`lr_scheduler={hparams.lr_scheduler}` needs to know how long the run is, but it has no end: set "
                "`--trainer.max_epochs` or `--trainer.max_steps`, or use `lr_scheduler=constant`."
            )
        share = round(hparams.warmup_ratio * steps) if math.isfinite(steps) else 0
        with_end = hparams.lr_scheduler == "cosine_with_min_lr"
        scheduler = get_scheduler(
            hparams.lr_scheduler,
            optimizer,
            num_warmup_steps=share if hparams.warmup_steps is None else hparams.warmup_steps,
            num_training_steps=steps,
            scheduler_specific_kwargs={"min_lr_rate": hparams.min_lr_ratio} if with_end else None,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Gradients of the step before go now: Lightning would keep them through this forward pass."""
        if not torch.is_tensor(self._loss):  # else they are those of earlier micro-batches
            self.trainer.optimizers[0].zero_grad()

    def mean_loss(self, total: Tensor, count: Tensor | int) -> Tensor:
        """Hand a training step's summed loss to Lightning, and remember it and how many items it sums."""
        count = torch.as_tensor(count, device=total.device)
        self._loss = self._loss + torch.stack([total.detach().double(), count.double()])
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the loss, and the norm of the gradient after it is divided by the global count."""
        total, count = self.sum_over_ranks(self._loss).tolist()
        self._loss = 0.0
        self.log("train/loss", total / max(count, 1), prog_bar=True)
        # Lightning divided each micro-batch by their number, and the strategy averaged the gradients over ranks.
        self._to_mean = self.trainer.accumulate_grad_batches * self.trainer.world_size / max(count, 1)
        self._norms = []
        for group in optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            self._norms.append(global_norm(gradients) * self._to_mean)
            self.log(f"{group.get('name', 'train')}/grad_norm", self._norms[-1])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Divide the summed gradient by the global count, and clip it; by norm in the same pass over it."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        factor, by_value = self._to_mean, gradient_clip_algorithm == GradClipAlgorithmType.VALUE
        if gradient_clip_val and not by_value:
            norm = torch.stack([norm.to(self.device) for norm in self._norms]).norm()
            factor = factor * (gradient_clip_val / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        torch._foreach_mul_([p.grad for p in parameters], factor)
        if gradient_clip_val and by_value:
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
