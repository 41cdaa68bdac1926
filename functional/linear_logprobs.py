"""Log-probabilities of tokens straight from hidden states: the logits of all tokens are never there in float32.

`token_logprobs(hidden @ weight.T, tokens)` computes the same, but autograd keeps float32 copies of the logits for its
backward pass, and adds up their gradient in several more. Here the backward pass is written out, and probabilities in
the dtype of the logits are all it needs:

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


def _pieces(block: slice, width: int) -> Iterator[tuple[slice, slice]]:
    """Of a block's rows so many at a time: where they are in the block, and among all rows."""
    for piece in _slices(block.stop - block.start, width, PIECE):
        yield piece, slice(block.start + piece.start, block.start + piece.stop)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, sampled_from: SampledFrom, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        N, V = len(hidden), len(weight)
        logprobs, entropy = hidden.new_zeros(2, N, dtype=torch.promote_types(hidden.dtype, torch.float32))
        # The backward needs probabilities, which take the place of the logits in their dtype: the gradient will be
        # rounded to it, too. More than a block is computed again, and so is what the entropy's gradient needs.
        keeps = N * V <= BLOCK and not with_entropy
        kept = None
        for block in _slices(N, V, BLOCK):
            logits = linear(hidden[block], weight)
            for piece, rows in _pieces(block, V):
                z = sampled_from.scaled(logits[piece], rows)
                p = z.softmax(1)
                chosen = tokens[rows, None]
                logprobs[rows] = _log(p.gather(1, chosen).squeeze(1), z.gather(1, chosen).squeeze(1), z)
                if with_entropy:
                    entropy[rows] = _entropy(p, z)
                if keeps:
                    logits[piece] = p
            kept = logits if keeps else None
        ctx.save_for_backward(hidden, weight, tokens, logprobs, kept)
        ctx.sampled_from, ctx.with_entropy = sampled_from, with_entropy
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, logprobs, kept = ctx.saved_tensors
        N, V = len(hidden), len(weight)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        scale = grad_logprobs / ctx.sampled_from.temperature
        of_entropy = grad_entropy / ctx.sampled_from.temperature if ctx.with_entropy else None
        for block in _slices(N, V, BLOCK):
            chosen = tokens[block, None]
            if kept is None:
                grad = linear(hidden[block], weight)
                for piece, rows in _pieces(block, V):
                    z = ctx.sampled_from.scaled(grad[piece], rows)
                    p = z.softmax(1)
                    slope = -scale[rows, None]
                    if of_entropy is not None:
                        log_p = z.log_softmax(1).nan_to_num_(neginf=0.0)  # where p is 0
                        slope = slope - (log_p + _entropy(p, z)[:, None]) * of_entropy[rows, None]
                    grad[piece] = p.mul_(slope).scatter_add_(1, chosen[piece], scale[rows, None])
            else:
                grad = kept * -scale[:, None].to(kept.dtype)
                # 1 − p of the token itself from its log-probability, which was not rounded.
                grad.scatter_(1, chosen, (scale * (1 - logprobs.exp()))[:, None].to(kept.dtype))
            if grad_hidden is not None:
                grad_hidden[block] = grad @ weight
            if ctx.needs_input_grad[1]:
                part = grad.T @ hidden[block]
                # Many blocks are added up in float32, as one product would be.
                grad_weight = part if grad_weight is None else grad_weight.to(logprobs.dtype) + part
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _log(p: Tensor, z: Tensor, all_z: Tensor) -> Tensor:
    """log p (n,) of tokens with scaled logits z (n,); where p has no digits any more, from all logits (n, V)."""
    tiny = p < 1e-30
    logs = p.log()
    return torch.where(tiny, z - all_z.logsumexp(1), logs) if tiny.any() else logs


def _entropy(p: Tensor, z: Tensor) -> Tensor:
    """log Σ exp z − Σ p z, (n,)."""
    largest, at = z.max(1, keepdim=True)
    lse = largest - p.gather(1, at).log()
    return lse.squeeze(1) - torch.linalg.vecdot(p, z.clamp(min=torch.finfo(z.dtype).min))  # 0 · -inf would be NaN
