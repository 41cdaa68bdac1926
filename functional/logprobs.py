"""From logits to what the losses use: log-probabilities of tokens, and entropy.

Both work on a few rows at a time, so that float32 copies of half-precision logits never have the size of all logits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ._tensors import upcast

CHUNK = 2**23  # logits in float32 at a time: 32 MiB


def _over_vocabulary(function: Callable[[Tensor], Tensor], logits: Tensor, temperature: float) -> Tensor:
    """Apply a function (..., V) -> (...) to logits / temperature, a chunk of the first dimension at a time."""
    if temperature <= 0:
        raise ValueError(f"`temperature` must be positive, but is {temperature}.")
    if logits.dim() < 2 or len(logits) == 0:
        return function(upcast(logits) / temperature)
    rows = max(1, CHUNK // logits[0].numel())
    return torch.cat([function(upcast(chunk) / temperature) for chunk in logits.split(rows)])


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token under the policy at a temperature.

    logprobs = z[token] − log Σ_v exp(z[v]),  z = logits / temperature

    Args:
        logits: (..., V); logits[:, t] predicts tokens[:, t], so shift before the call.
        tokens: token ids, valid ones under the mask too, (...).
        temperature: that of sampling, also in training: 0.7 to 1.

    Returns:
        float32 (float64 for float64 logits), (...).

    Raises:
        ValueError: if the shapes do not fit or the temperature is not positive.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
        >>> token_logprobs(logits, torch.tensor([1, 0])).exp()
        tensor([0.7500, 0.5000])
    """
    if tokens.shape != logits.shape[:-1]:
        raise ValueError(
            f"`tokens` must have the shape of `logits` without its last dimension, {tuple(logits.shape[:-1])}, "
            f"but has {tuple(tokens.shape)}."
        )
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # (...)
    return upcast(chosen) / temperature - _over_vocabulary(lambda z: z.logsumexp(dim=-1), logits, temperature)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of the policy at a temperature.

    H = −Σ_v π(v) log π(v),  π = softmax(logits / temperature)

    Args:
        logits: (..., V); -inf (or the lowest float) for tokens that cannot come is fine.
        temperature: that of sampling: 0.7 to 1.

    Returns:
        between 0 and log V, (...).

    Raises:
        ValueError: if the temperature is not positive.

    Example:
        >>> import torch
        >>> entropy(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor(0.6931)
    """
    return _over_vocabulary(_entropy, logits, temperature)


def _entropy(z: Tensor) -> Tensor:
    logprobs = z.log_softmax(dim=-1)
    # 0 · log 0 = 0: the log is replaced, not the product, or the gradient would be 0 · -inf = NaN.
    return -(logprobs.exp() * logprobs.masked_fill(logprobs.isneginf(), 0.0)).sum(dim=-1)
