"""Causal attention over short sequences on a CPU, written out as products of small matrices.

torch's flash kernel for CPUs is made for long sequences: of 32 tokens its backward takes four times as long as this.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORT = 64
"""Tokens up to which this is faster; it keeps L x L weights for the backward, which flash does not."""


def is_short(query: Tensor) -> bool:
    """Whether attention of a query (B, heads, L, D) is better written out.

    That without a gradient flash is as fast does not count: a policy that has not moved shall say the same of a token
    in scoring and in training, to the last digit.
    """
    return query.device.type == "cpu" and query.shape[2] <= SHORT


def short_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale · Q Kᵀ, of what is not later) V, computed in float32 at least.

    Args:
        query: (B, heads, L, D).
        key: (B, fewer, L, D); each head of it serves heads / fewer heads of the query, next to each other.
        value: likewise.
        scale: of the products.

    Returns:
        (B, heads, L, D) in the dtype of the query.
    """
    with torch.autocast(query.device.type, enabled=False):
        return _ShortAttention.apply(query, key, value, scale)


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grouped(x: Tensor, heads: int) -> Tensor:
    """(B, heads, groups · L, D), at least float32: the queries that share a head of the keys, one below the other."""
    return _upcast(x).reshape(len(x), heads, -1, x.shape[-1])


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        L, heads = query.shape[2], key.shape[1]
        scores = _grouped(query, heads) @ _upcast(key).transpose(-1, -2)  # (B, heads, groups · L, L)
        later = torch.full((L, L), -torch.inf, dtype=scores.dtype).triu(1)
        scores.mul_(scale).view(*scores.shape[:2], -1, L, L).add_(later)
        weights = scores.softmax(-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return (weights @ _upcast(value)).view(query.shape).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, weights = ctx.saved_tensors
        grad = _grouped(grad, key.shape[1])
        of_value = weights.transpose(-1, -2) @ grad
        of_weights = grad @ _upcast(value).transpose(-1, -2)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        of_query = (of_scores @ _upcast(key)).view(query.shape)
        of_key = of_scores.transpose(-1, -2) @ _grouped(query, key.shape[1])
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), None
