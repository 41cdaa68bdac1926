"""`--trainer.precision bf16-true`: the backbone's weights in half precision, and nothing else."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch.plugins import HalfPrecision
from torch import nn


class HalfBackbone(HalfPrecision):
    """Lightning's HalfPrecision without its casts of all else.

    `TextModule.backbone_dtype` builds the backbone in it. Lightning would also cast what a batch holds (log-probs,
    advantages, ratings), the adapters and heads, the rotary frequencies and the metrics' sums, and let every new tensor
    be of half precision. Log-probs around −5 then have steps of 0.03, and ratings that differ become ties.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Leave it: the backbone was built in half precision."""
        return module

    def convert_input(self, data: Any) -> Any:
        """Leave it."""
        return data

    def forward_context(self) -> AbstractContextManager:
        """New tensors are float32, as ever."""
        return nullcontext()

    tensor_init_context = module_init_context = forward_context
