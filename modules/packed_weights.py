"""Weights laid out for products with few rows, on a CPU.

oneDNN lays a weight of 16 bits out anew in every product. With many rows that does not count; a step of sampling has
one row to a sequence. Laid out once for a whole rollout, the products are the same to the last bit, and take half the
time for up to 8 sequences, four fifths for 64.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def packed_weights(model: nn.Module, rows: int) -> Iterator[None]:
    """Within the context a model's linear layers with weights of 16 bits use a second copy of them, without gradient.

    Args:
        model: on a CPU; elsewhere, and where torch has no such products, nothing happens.
        rows: of the products.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and _can_be_packed(m.weight)]
    for layer in layers:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        layer.forward = partial(_linear, packed=packed, bias=layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _can_be_packed(weight: Tensor) -> bool:
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.dtype not in HALF:
        return False
    is_supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    operations = ("_reorder_linear_weight", "_linear_pointwise", is_supported[weight.dtype])
    if not (torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operations)):
        return False
    return getattr(torch.ops.mkldnn, is_supported[weight.dtype])()


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
