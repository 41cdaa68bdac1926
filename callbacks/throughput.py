"""How fast a run trains, how well it uses the device, and how much memory it took."""

import time
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor, nn

from ._shared import peak_memory_gib

OF_ALL_RANKS = dict(sync_dist=True, reduce_fx="sum")
_PRECISIONS = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}


class Throughput(L.Callback):
    """Log tokens per second of the updates, model FLOPs utilisation where the device's peak is known, and peak memory.

    `throughput/trained_tokens_per_second`: tokens (prompt and response, no padding) that went through a forward and
    backward pass, of all ranks, per second from an epoch's first batch to its last.
    `throughput/mfu`: their FLOPs, 2 per weight forward, 2 back to the activations, 2 to each trained weight, over the
    device's peak; attention's own and recomputed ones are not counted (Chowdhery et al. 2022,
    https://arxiv.org/abs/2204.02311, appendix B).
    `memory/peak_gib`: the process's largest memory so far, on a GPU what tensors took of it; the largest rank's.
    """

    def __init__(self) -> None:
        self._tokens: Tensor | int = 0
        self._start = self._end = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tokens = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(self._tokens, int):
            self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens = self._tokens + tokens_in(batch)  # a tensor: nothing waits for the device here
        self._end = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = trainer.strategy.root_device
        on_gpu = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else peak_memory_gib()
        if peak is not None:
            pl_module.log("memory/peak_gib", peak, sync_dist=True, reduce_fx="max")
        seconds, tokens = self._end - self._start, float(self._tokens)
        if not tokens or seconds <= 0:  # a resumed run that found nothing left to do in this epoch
            return
        pl_module.log("throughput/trained_tokens_per_second", tokens / seconds, **OF_ALL_RANKS)
        precision = str(trainer.precision)
        dtype = pl_module.dtype if precision.startswith("32") else _PRECISIONS[precision.partition("-")[0]]
        if peak_flops := get_available_flops(device, dtype):
            share = tokens * flops_per_token(pl_module) / seconds / peak_flops
            pl_module.log("throughput/mfu", share, sync_dist=True)


def tokens_in(batch: Any) -> Tensor | int:
    """Real tokens of a batch: of an on-policy iteration's or a data module's."""
    if hasattr(batch, "response_mask"):
        return batch.prompt_mask.sum() + batch.response_mask.sum()
    return batch["attention_mask"].sum() if isinstance(batch, dict) and "attention_mask" in batch else 0


def flops_per_token(module: nn.Module) -> int:
    """2 per weight for the forward pass, 2 for the gradient of activations, 2 per trained weight for its own."""
    weights = list(module.parameters())
    return 4 * sum(p.numel() for p in weights) + 2 * sum(p.numel() for p in weights if p.requires_grad)
