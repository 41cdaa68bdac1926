"""Log-probabilities of tokens straight from hidden states: the logits of all tokens are never there in float32.

`token_logprobs(hidden @ weight.T, tokens)` computes the same, but autograd keeps float32 copies of the logits for its
backward pass, and adds up their gradient in several more. Here the backward pass is written out:

    ∂ logprob / ∂ z_v = 1[v = token] − p_v,     ∂ H / ∂ z_v = −p_v (log p_v + H),     p = softmax(z)
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

BLOCK = 2**27  # logits at a time, in the dtype of the hidden states: 256 MiB of bfloat16
PIECE = 2**22  # of these, so many at a time in float32: 16 MiB


class TokenLikelihoods(NamedTuple):
    """What a policy says of N tokens."""

    logprobs: Tensor
    """(N,) float32 (float64 for float64 hidden states)."""
    entropy: Tensor
    """(N,) in nats, of the distribution that the token is from; 0 if it was not asked for."""


class SampledFrom(NamedTuple):
    """What stands between a policy's logits and the distribution that is sampled from."""

    temperature: float = 1.0
    forbidden: Sequence[int] = ()
    """Ids of tokens that cannot come,"""
    where: Tensor | None = None
    """at these rows, (N,) bool."""

    def constrain(self, logits: Tensor) -> Tensor:
        """Logits (N, V), -inf where a token cannot come."""
        if self.where is None:
            return logits
        return logits.index_fill(1, torch.tensor(self.forbidden, device=logits.device), -torch.inf).where(
            self.where[:, None], logits
        )

    def scaled(self, logits: Tensor, rows: slice) -> Tensor:
        """Of some rows, a new tensor: z = logits / temperature, in float32 at least, -inf where a token cannot come."""
        z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        if self.temperature != 1.0:
            z /= self.temperature
        for token in self.forbidden if self.where is not None else ():
            z[:, token].masked_fill_(self.where[rows], -torch.inf)
        return z


def linear_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, sampled_from: SampledFrom | None = None, with_entropy: bool = False
) -> TokenLikelihoods:
    """Log-probability of each token, and entropy, from the hidden states before them and the head's weight.

    logprobs = z[token] − log Σ_v exp(z[v]),   H = −Σ_v p_v log p_v,   z = hidden · weightᵀ / temperature

    Args:
        hidden: (N, H).
        weight: of a language-model head without bias, (V, H).
        tokens: token ids, (N,).
        sampled_from: temperature and forbidden tokens; None is temperature 1 and nothing forbidden.
        with_entropy: whether the entropy is asked for.

    Raises:
        ValueError: if the shapes do not fit or the temperature is not positive.

    Example:
        >>> import torch
        >>> hidden, weight = torch.eye(2), torch.tensor([[0.25, 0.5], [0.75, 0.5]]).log()
        >>> linear_logprobs(hidden, weight, torch.tensor([1, 0])).logprobs.exp()
        tensor([0.7500, 0.5000])
    """
    sampled_from = SampledFrom() if sampled_from is None else sampled_from
    if sampled_from.temperature <= 0:
        raise ValueError(f"`temperature` must be positive, but is {sampled_from.temperature}.")
    if hidden.dim() != 2 or tokens.shape != hidden.shape[:1]:
        raise ValueError(
            f"`hidden` must be (N, H) and `tokens` (N,), but have {tuple(hidden.shape)} and {tuple(tokens.shape)}."
        )
    if torch.is_autocast_enabled(hidden.device.type):  # as `linear` would
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return TokenLikelihoods(*_LinearLogprobs.apply(hidden, weight, tokens, sampled_from, with_entropy))


def _slices(rows: int, width: int, budget: int) -> Iterator[slice]:
    size = max(1, budget // width)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, sampled_from: SampledFrom, with_entropy: bool
    ) -> Any:
        N, V = len(hidden), len(weight)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, lse = torch.zeros(3, N, dtype=dtype, device=hidden.device)
        kept = None
        for block in _slices(N, V, BLOCK):
            logits = linear(hidden[block], weight)
            for piece in _slices(len(logits), V, PIECE):
                rows = slice(block.start + piece.start, block.start + piece.stop)
                z = sampled_from.scaled(logits[piece], rows)
                chosen = z.gather(1, tokens[rows, None]).squeeze(1)
                largest = z.amax(1)
                z -= largest[:, None]
                p = z.exp()
                total = p.sum(1)
                lse[rows] = largest + total.log()
                logprobs[rows] = chosen - lse[rows]
                if with_entropy:
                    entropy[rows] = total.log() - p.mul_(z).nansum(1) / total  # 0 · -inf is 0
            kept = logits if N * V <= BLOCK else None  # more than a block is computed again
        ctx.save_for_backward(hidden, weight, tokens, lse, entropy if with_entropy else None, kept)
        ctx.sampled_from = sampled_from
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> Any:
        hidden, weight, tokens, lse, entropy, kept = ctx.saved_tensors
        N, V = len(hidden), len(weight)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for block in _slices(N, V, BLOCK):
            logits = linear(hidden[block], weight) if kept is None else kept
            grad = torch.empty_like(logits)
            for piece in _slices(len(logits), V, PIECE):
                rows = slice(block.start + piece.start, block.start + piece.stop)
                z = ctx.sampled_from.scaled(logits[piece], rows)
                z -= lse[rows, None]  # log p
                p = z.exp()
                if entropy is not None:
                    slope = z.add_(entropy[rows, None]).nan_to_num_(neginf=0.0).mul_(grad_entropy[rows, None])
                    slope += grad_logprobs[rows, None]
                    p *= slope.neg_()
                else:
                    p *= -grad_logprobs[rows, None]
                p.scatter_add_(1, tokens[rows, None], grad_logprobs[rows, None])
                grad[piece] = p.div_(ctx.sampled_from.temperature)
            if grad_hidden is not None:
                grad_hidden[block] = grad @ weight
            if ctx.needs_input_grad[1]:
                part = grad.T @ hidden[block]
                # Many blocks are added up in float32, as one product would be.
                grad_weight = part if grad_weight is None else grad_weight.to(lse.dtype) + part
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None
