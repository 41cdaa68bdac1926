"""What every file here needs: the dtype rule, the shape checks, and the bound on log-ratios."""

import torch
from torch import Tensor

# exp(20) is about 5e8: far outside any clip range, far inside float32. Only the upper side needs a bound, since exp of
# a large negative number is 0, in value and in gradient.
MAX_LOG_RATIO = 20.0


def upcast(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is float32 or float64 already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all named tensors have the shape of the first."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(
                f"`{name}` must have the shape of `{first_name}`, {tuple(first.shape)}, but has {tuple(tensor.shape)}."
            )


def check_one_per_row(matrix_name: str, matrix: Tensor, **vectors: Tensor) -> None:
    """Raise ValueError unless all named tensors have shape (B,) for a matrix of shape (B, ...)."""
    for name, vector in vectors.items():
        if vector.shape != matrix.shape[:1]:
            raise ValueError(
                f"`{name}` must have one entry per row of `{matrix_name}`, shape {tuple(matrix.shape[:1])}, "
                f"but has {tuple(vector.shape)}."
            )


def check_bool(**masks: Tensor) -> None:
    """Raise ValueError unless all named tensors are bool."""
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ValueError(f"`{name}` must be a bool tensor, True = counts, but is {mask.dtype}: use `.bool()`.")


def bounded_log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """`logprobs - old_logprobs`, at most `MAX_LOG_RATIO`, so that `exp` of it is finite."""
    return (upcast(logprobs) - upcast(old_logprobs)).clamp(max=MAX_LOG_RATIO)
