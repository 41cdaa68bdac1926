"""Attention on a CPU, written out as products of small matrices: over short sequences, and of one new token.

torch's flash kernel for CPUs is made for many queries: over 32 tokens forward and backward take three times as long as
this, over 128 twice, and one token that looks at a cache takes four to seven times as long, however long the cache is.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORT = 512
"""Tokens up to which this is faster."""
BLOCK = 64
"""Queries at a time, each block with the keys up to its end. One block keeps its weights for the backward pass, several
compute them again."""


CACHED = 2**22
"""Elements of keys that are made float32 at a time: 16 MiB."""


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


def is_step(query: Tensor) -> bool:
    """Whether a query (B, heads, L, D) is of one new token that is sampled, not trained on, on a CPU."""
    return query.device.type == "cpu" and query.shape[2] == 1 and not torch.is_grad_enabled()


def step_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q Kᵀ) V of one query to a sequence, computed in float32 at least; without a gradient.

    Args:
        query: (B, heads, 1, D).
        key: (B, fewer, L, D), as in `short_attention`.
        value: likewise.
        mask: (B or 1, 1, 1, L), bool, or what is added to the products; None looks at all.
        scale: of the products.
    """
    grouped, rows = _grouped(query, key.shape[1]), max(1, CACHED // key[0].numel())
    with torch.autocast(query.device.type, enabled=False):
        if len(key) <= rows:
            out = _attend(grouped, key, value, mask, scale)
        else:
            masks = [None] * len(key) if mask is None else mask.expand(len(key), -1, -1, -1).split(rows)
            parts = zip(grouped.split(rows), key.split(rows), value.split(rows), masks, strict=False)
            out = torch.cat([_attend(*part, scale) for part in parts])
    return out.view(query.shape).to(query.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = (query @ _upcast(key).transpose(-1, -2)).mul_(scale)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
    return scores.softmax(-1) @ _upcast(value)


def _upcast(x: Tensor) -> Tensor:
    """At least float32; what is made so lies in one piece: products would copy it else, each time."""
    return x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """(B, heads, groups · L, D), at least float32: the queries that share a head of the keys, one below the other."""
    return _upcast(x).reshape(len(x), heads, -1, x.shape[-1])


def _blocks(tokens: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK))


def _weights(query: Tensor, key: Tensor, block: slice, scale: float) -> Tensor:
    """(B, heads of the keys, groups · block, keys up to its end): softmax of a block's scaled products."""
    rows, seen = block.stop - block.start, block.stop
    scores = _grouped(query[:, :, block], key.shape[1]) @ key[:, :, :seen].transpose(-1, -2)
    later = torch.full((rows, seen), -torch.inf, dtype=scores.dtype).triu(1 + block.start)
    scores.mul_(scale).view(*scores.shape[:2], -1, rows, seen).add_(later)
    return scores.softmax(-1)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, whole_key, whole_value = torch.empty_like(query), _upcast(key), _upcast(value)
        for block in _blocks(query.shape[2]):
            weights = _weights(query, whole_key, block, scale)
            out[:, :, block] = (weights @ whole_value[:, :, : block.stop]).view_as(out[:, :, block])
        ctx.save_for_backward(query, key, value, weights if query.shape[2] <= BLOCK else None)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, kept = ctx.saved_tensors
        whole_key, whole_value, heads = _upcast(key), _upcast(value), key.shape[1]
        of_query, of_key, of_value = torch.empty_like(query), None, None
        for block in reversed(list(_blocks(query.shape[2]))):  # the last one sees all keys
            seen, own = slice(block.stop), _grouped(grad[:, :, block], heads)
            weights = _weights(query, whole_key, block, ctx.scale) if kept is None else kept
            to_value = weights.transpose(-1, -2) @ own
            of_weights = own @ whole_value[:, :, seen].transpose(-1, -2)
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            of_query[:, :, block] = (of_scores @ whole_key[:, :, seen]).view_as(of_query[:, :, block])
            to_key = of_scores.transpose(-1, -2) @ _grouped(query[:, :, block], heads)
            if of_key is None:
                of_key, of_value = to_key, to_value
            else:
                of_key[:, :, seen] += to_key
                of_value[:, :, seen] += to_value
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None
