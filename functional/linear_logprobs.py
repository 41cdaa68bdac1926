"""Log-probabilities of tokens straight from hidden states: the logits of all tokens are never there in float32.

`token_logprobs(hidden @ weight.T, tokens)` computes the same, but autograd keeps float32 copies of the logits for its
backward pass, and adds up their gradient in several more. Here the backward pass is written out, and probabilities in
the dtype of the logits are all it needs:

    ∂ logprob / ∂ z_v = 1[v = token] − p_v,     ∂ H / ∂ z_v = −p_v (log p_v + H),     p = softmax(z)

The token's own entry, 1 − p, is kept apart in float32, so that it has digits where the policy is almost certain.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

BLOCK = 2**27  # logits at a time, in the dtype of the hidden states: 256 MiB of bfloat16
PIECE = 2**22  # of these, so many at a time in float32 on a CPU: 16 MiB


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
        self._check(logits.shape[-1])
        return logits.index_fill(1, torch.tensor(self.forbidden, device=logits.device), -torch.inf).where(
            self.where[:, None], logits
        )

    def scaled(self, logits: Tensor, rows: slice) -> Tensor:
        """Of some rows, a new tensor: z = logits / temperature, in float32 at least, -inf where a token cannot come."""
        z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        if self.temperature != 1.0:
            z /= self.temperature
        return self.fill(z, rows, -torch.inf)

    def fill(self, z: Tensor, rows: slice, value: float) -> Tensor:
        """Write a value where a token cannot come: `scaled` -inf; 0 for sums in which its probability is a factor."""
        if self.where is None:
            return z
        self._check(z.shape[-1])
        for token in self.forbidden:
            z[:, token].masked_fill_(self.where[rows], value)
        return z

    def _check(self, vocabulary: int) -> None:
        if self.forbidden and not 0 <= min(self.forbidden) <= max(self.forbidden) < vocabulary:
            raise ValueError(f"`forbidden` must lie between 0 and {vocabulary - 1}, but has {list(self.forbidden)}.")


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
    # The backward needs probabilities, which take the place of the logits in their dtype: the gradient will be rounded
    # to it, too. More than a block is computed again, and so is what the entropy's gradient needs.
    keeps = torch.is_grad_enabled() and not with_entropy and len(hidden) * len(weight) <= BLOCK
    return TokenLikelihoods(*_LinearLogprobs.apply(hidden, weight, tokens, sampled_from, with_entropy, keeps))


def _slices(rows: int, width: int, budget: int) -> Iterator[slice]:
    size = max(1, budget // width)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _pieces(block: slice, logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Of a block's rows so many at a time: where they are in the block, and among all rows.

    A GPU takes them all at once: each piece has a dozen kernels to launch.
    """
    for piece in _slices(*logits.shape, PIECE if logits.device.type == "cpu" else BLOCK):
        yield piece, slice(block.start + piece.start, block.start + piece.stop)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        sampled_from: SampledFrom,
        with_entropy: bool,
        keeps: bool,
    ) -> tuple[Tensor, Tensor]:
        N, V = len(hidden), len(weight)
        logprobs, entropy = hidden.new_zeros(2, N, dtype=torch.promote_types(hidden.dtype, torch.float32))
        kept = None
        for block in _slices(N, V, BLOCK):
            logits = linear(hidden[block], weight)
            for piece, rows in _pieces(block, logits):
                z = sampled_from.scaled(logits[piece], rows)
                p = z.softmax(1)
                at = _at(tokens[rows])
                logprobs[rows] = _log(p[at], z[at], z)
                if with_entropy:
                    lse = z[at] - logprobs[rows]
                    entropy[rows] = lse - torch.linalg.vecdot(p, sampled_from.fill(z, rows, 0.0))
                if keeps:
                    p[at] = 0
                    logits[piece] = p
            kept = logits if keeps else None
        ctx.save_for_backward(hidden, weight, tokens, logprobs, kept)
        ctx.sampled_from, ctx.with_entropy = sampled_from, with_entropy
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, logprobs, kept = ctx.saved_tensors
        temperature = ctx.sampled_from.temperature
        scale, of_entropy = grad_logprobs / temperature, grad_entropy / temperature if ctx.with_entropy else None
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for block in _slices(len(hidden), len(weight), BLOCK):
            # The gradient of the logits is own · one-hot(token) − factor · others, row by row.
            if kept is not None:
                others, own, factor = kept, scale * (1 - logprobs.exp()), scale
            else:
                logits, of_block = linear(hidden[block], weight), (block, tokens)
                others, own = _slopes(logits, *of_block, ctx.sampled_from, scale, of_entropy)
                factor = torch.ones_like(own)
            own, factor = own[:, None], factor[:, None]
            if grad_hidden is not None:
                grad_hidden[block] = own * weight[tokens[block]] - factor * (others @ weight)
            if ctx.needs_input_grad[1]:
                part = (others.T @ (hidden[block] * -factor).to(hidden.dtype)).to(weight.dtype)
                part = add_rows(part, tokens[block], own * hidden[block])
                # Many blocks are added up in float32, as one product would be.
                grad_weight = part if grad_weight is None else grad_weight.to(logprobs.dtype) + part
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _slopes(
    logits: Tensor,
    block: slice,
    tokens: Tensor,
    sampled_from: SampledFrom,
    scale: Tensor,
    of_entropy: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Of a block's logits, in their place, minus their gradient, and 0 for the tokens' own; and these."""
    own = torch.empty_like(scale[block])
    for piece, rows in _pieces(block, logits):
        z, at = sampled_from.scaled(logits[piece], rows), _at(tokens[rows])
        p = z.softmax(1)
        slope = scale[rows, None]
        if of_entropy is not None:
            z = sampled_from.fill(z, rows, 0.0)
            of_sum = torch.linalg.vecdot(p, z)  # log p + H = z − Σ p z
            slope = slope + (z - of_sum[:, None]) * of_entropy[rows, None]
        p.mul_(slope)
        own[piece] = scale[rows] - p[at]
        p[at] = 0
        logits[piece] = p
    return logits, own


def _at(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens are among the logits of all, a row to each."""
    return torch.arange(len(tokens), device=tokens.device), tokens


def add_rows(total: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """`total` (V, H) with each row added at its token; those of one token are added up in the rows' dtype."""
    present, which = tokens.unique(return_inverse=True)
    sums = rows.new_zeros(len(present), rows.shape[1]).index_add_(0, which, rows)
    total[present] = (total[present] + sums).to(total.dtype)
    return total


def _log(p: Tensor, z: Tensor, all_z: Tensor) -> Tensor:
    """log p (n,) of tokens with scaled logits z (n,); where p has no digits any more, from all logits (n, V)."""
    tiny = p < 1e-30
    logs = p.log()
    return torch.where(tiny, z - all_z.logsumexp(1), logs) if tiny.any() else logs
