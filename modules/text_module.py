"""What every module here shares: a tokenizer, a backbone, one optimizer, and a loss that is a *global* mean."""

import inspect
import math
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from ..functional import masked_sum
from ..pretrained import load_tokenizer
from .backbone import DTYPES, add_lora
from .metrics import Mean

Plain = str | int | float | bool | None


class TextModule(L.LightningModule):
    """Base of the language modules.

    Two things that Lightning leaves to its users are done here once.

    1. The loss is a mean over all tokens (or pairs) of the *whole* optimizer step. `training_step` returns a sum and
       counts its items; before the step the gradient is divided once, by the count over all micro-batches and ranks.
       So `accumulate_grad_batches`, the number of ranks and the order of the data change no update, however unequal
       the lengths are.
    2. A checkpoint holds what is trained and nothing else: with LoRA that is the adapters and the heads.

    Args:
        model: a hub id, a local folder, `package:NAME`, or a `PreTrainedModel`.
        tokenizer: the same; None takes the model's own.
        dtype: of the backbone's weights: `float32`, `bfloat16` or `float16`. LoRA adapters and scalar heads are
            always float32. This is apart from the Trainer's `precision`, which may stay at `32-true`.
        lora_r: rank of the LoRA adapters; 0 trains every weight. Usual: 8 to 64.
        lora_alpha: LoRA's scale is lora_alpha / lora_r.
        lora_target_modules: names of the layers that get adapters, or `all-linear`.
        lora_last_layers: adapters only in the last so many layers, where the backward pass then stops: less time, less
            memory. None is all layers.
        learning_rate: of AdamW at its highest.
        weight_decay: of AdamW.
        adam_eps: of AdamW. RLHF papers often use 1e-5.
        lr_scheduler: shape of the learning rate over the optimizer steps of the run.
        warmup_ratio: share of the steps over which the learning rate rises from 0.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        trust_remote_code: run Python code that comes with the model. Off for good reason.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        lora_r: int = 0,
        lora_alpha: int = 32,
        lora_target_modules: str | list[str] = "all-linear",
        lora_last_layers: int | None = None,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.0,
        adam_eps: float = 1e-8,
        lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear",
        warmup_ratio: float = 0.0,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        require("dtype", dtype in DTYPES, f"one of {list(DTYPES)}", dtype)
        require("lora_r", lora_r >= 0, "at least 0", lora_r)
        require("learning_rate", learning_rate >= 0, "at least 0", learning_rate)
        require("warmup_ratio", 0 <= warmup_ratio <= 1, "between 0 and 1", warmup_ratio)
        # Arguments that are objects (a model, a function) stay out of checkpoints: those load without unpickling.
        self.save_hyperparameters(ignore=_objects_given(self, inspect.currentframe()), logger=False)
        self._model_spec, self._tokenizer_spec = model, tokenizer
        self.strict_loading = False  # checkpoints hold only what is trained; on_load_checkpoint checks that
        self._means = nn.ModuleDict()
        self._loss_count = 0.0

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; DataModules without one of their own use this."""
        spec = self._tokenizer_spec or self._model_spec
        if isinstance(spec, PreTrainedModel):
            raise ValueError("`tokenizer` is required when `model` is a PreTrainedModel object.")
        return load_tokenizer(spec, self.hparams.trust_remote_code) if isinstance(spec, str) else spec

    # --- building -------------------------------------------------------------------------------------------------

    def prepare_backbone(self, model: PreTrainedModel) -> nn.Module:
        """LoRA and gradient checkpointing as the flags say."""
        hparams = self.hparams
        model.train()  # gradient checkpointing does nothing in eval mode; dropout is 0 anyway
        if hparams.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not hparams.lora_r:
            return model
        targets = hparams.lora_target_modules
        return add_lora(model, hparams.lora_r, hparams.lora_alpha, targets, hparams.lora_last_layers)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups; a subclass with several learning rates names them here."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "name": "all"}]

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW and a learning-rate schedule over the optimizer steps of the run."""
        hparams = self.hparams
        optimizer = torch.optim.AdamW(
            self.parameter_groups(), lr=hparams.learning_rate, weight_decay=hparams.weight_decay, eps=hparams.adam_eps
        )
        steps = self.trainer.estimated_stepping_batches
        if hparams.lr_scheduler != "constant" and not math.isfinite(steps):
            raise ValueError(
                f"`lr_scheduler={hparams.lr_scheduler}` needs to know how long the run is, but it has no end: set "
                "`--trainer.max_epochs` or `--trainer.max_steps`, or use `lr_scheduler=constant`."
            )
        scheduler = get_scheduler(
            hparams.lr_scheduler,
            optimizer,
            num_warmup_steps=round(hparams.warmup_ratio * steps) if math.isfinite(steps) else 0,
            num_training_steps=steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- the loss is a global mean --------------------------------------------------------------------------------

    def mean_loss(self, total: Tensor, count: Tensor | int) -> Tensor:
        """Hand a training step's summed loss to Lightning, and remember how many items it sums."""
        self._loss_count = self._loss_count + torch.as_tensor(count, dtype=torch.float64).detach()
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the summed gradient by the global count, before it is clipped."""
        count = self.sum_over_ranks(torch.as_tensor(self._loss_count, device=self.device)).clamp(min=1)
        self._loss_count = 0.0
        # Lightning divided each micro-batch by their number, and the strategy averaged the gradients over ranks.
        undo = self.trainer.accumulate_grad_batches * self.trainer.world_size
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(undo / count.item())

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks; the tensor itself in one process."""
        if self.trainer.world_size == 1:
            return values
        return self.trainer.strategy.reduce(values.clone(), reduce_op="sum")

    def log_mean(self, name: str, values: Tensor, mask: Tensor | None = None, **kwargs: Any) -> None:
        """Log the mean over the True entries of the mask, exact over batches and ranks: sum and count stay apart."""
        mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
        key = name.replace("/", "_")
        if key not in self._means:
            self._means[key] = Mean().to(values.device)
        self._means[key].update(masked_sum(values.detach(), mask), mask.sum())
        # Lightning looks up a metric's name only once; this one may be younger than that.
        self.log(name, self._means[key], on_step=False, on_epoch=True, metric_attribute=f"_means.{key}", **kwargs)

    # --- checkpoints and export -----------------------------------------------------------------------------------

    def trained_names(self) -> set[str]:
        """Names in the state dict of what is trained."""
        return {name for name, value in self.state_dict(keep_vars=True).items() if value.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what is trained."""
        trained = self.trained_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["module_class"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another module, or of another network."""
        saved_by = checkpoint.get("module_class", "another library")
        missing = self.trained_names() - checkpoint["state_dict"].keys()
        if saved_by != type(self).__name__ or missing:
            raise ValueError(
                f"The checkpoint was written by {saved_by} and does not fit this {type(self).__name__}: "
                f"{len(missing)} of its trained tensors are not in the file{_examples(missing)}. Give the checkpoint "
                "of the same module, with the same `model` and `lora_r`."
            )
        # What is frozen comes from the model itself: with it the file is whole, and Lightning has nothing to warn of.
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a Hugging Face folder: weights (LoRA merged), config and tokenizer. Call it on all ranks."""
        if rank_zero_only.rank == 0:
            self.export(Path(folder))
            self.tokenizer.save_pretrained(folder)

    def export(self, folder: Path) -> None:
        """Write the network itself."""
        raise NotImplementedError


def require(name: str, holds: bool, expected: str, got: object) -> None:
    """ValueError that names the argument, what was expected and what came."""
    if not holds:
        raise ValueError(f"`{name}` must be {expected}, but got {got!r}.")


def _objects_given(self: object, frame: FrameType | None) -> list[str]:
    """Names of the constructor arguments, of this class and its subclasses, that are no plain values."""
    names = []
    while frame is not None and frame.f_locals.get("self") is self and frame.f_code.co_name == "__init__":
        given = frame.f_locals | frame.f_locals.get("kwargs", {})
        names += [name for name, value in given.items() if name != "kwargs" and not _is_plain(value)]
        frame = frame.f_back
    return names


def _is_plain(value: object) -> bool:
    return isinstance(value, Plain) or (isinstance(value, list | tuple) and all(_is_plain(v) for v in value))


def _examples(names: set[str]) -> str:
    return f", such as `{min(names)}`" if names else ""
