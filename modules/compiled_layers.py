"""Decoder layers compiled by `torch.compile`, for training and scoring: norms, rotary positions, activations and sums
become few kernels, where each of them reads and writes all tokens several times.

One program serves all layers and all lengths. Attention over sequences without padding stays as it is: it depends on
how many there are.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(model: PreTrainedModel) -> None:
    """Let the decoder layers of a model be compiled when they are first called without a cache, in place."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and type(module).__module__.startswith("transformers."):
            module.__class__ = _compiled(type(module))


@cache
def _compiled(kind: type) -> type:
    """One class for all layers of a kind, since programs are kept by it."""
    own = {
        "__module__": __name__,
        "program": staticmethod(torch.compile(kind.forward, dynamic=True, recompile_limit=64)),
    }
    return type(kind.__name__, (CompiledLayer, kind), own)


class CompiledLayer(nn.Module):
    """What a layer does, as one program; with a cache, where each token finds another shape, as it did."""

    program: ClassVar[Callable]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own."""
        if kwargs.get("past_key_values") is not None:
            return super().forward(*args, **kwargs)
        return self.program(self, *args, **kwargs)
