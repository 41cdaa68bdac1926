"""How losses per token become one number: sums and what to divide them by.

Both are additive over micro-batches and ranks; one division at the end gives the mean over all of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .masking import masked_mean, masked_sum


class Parts(NamedTuple):
    """A mean that is still in two parts: total / count."""

    total: Tensor
    """Scalar, with gradient."""
    count: Tensor
    """Scalar."""


def token_mean(losses: Tensor, mask: Tensor) -> Parts:
    """Every token weighs the same, so long responses weigh more.

    Σ_i Σ_t losses_it / Σ_i |o_i|

    Args:
        losses: per token, (B, T).
        mask: bool, True = counts, (B, T).

    Returns:
        total and count.

    Source:
        Yu et al. 2025, "DAPO", equation 12, https://arxiv.org/abs/2503.14476; PPO and most RLHF before it.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> token_mean(torch.tensor([[1.0, 2.0], [6.0, 9.0]]), mask)
        Parts(total=tensor(9.), count=tensor(3))
    """
    return Parts(masked_sum(losses, mask), mask.sum())


def sequence_mean(losses: Tensor, mask: Tensor) -> Parts:
    """Every response weighs the same, so tokens of long responses weigh less.

    Σ_i (1 / |o_i|) Σ_t losses_it / B

    Args:
        losses: per token, (B, T).
        mask: bool, True = counts, (B, T).

    Returns:
        total and count.

    Source:
        Shao et al. 2024, "DeepSeekMath" (GRPO), equation 3, https://arxiv.org/abs/2402.03300

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> sequence_mean(torch.tensor([[1.0, 2.0], [6.0, 9.0]]), mask)
        Parts(total=tensor(7.5000), count=tensor(2))
    """
    return Parts(masked_mean(losses, mask, dim=1).sum(), torch.tensor(len(mask), device=mask.device))


def fixed_length_mean(losses: Tensor, mask: Tensor, length: int) -> Parts:
    """Every token weighs the same, whatever the lengths of the responses in the batch are.

    Σ_i Σ_t losses_it / (B · length)

    Args:
        losses: per token, (B, T).
        mask: bool, True = counts, (B, T).
        length: a constant, usually the longest response that is possible.

    Returns:
        total and count.

    Source:
        Liu et al. 2025, "Understanding R1-Zero-Like Training" (Dr. GRPO), https://arxiv.org/abs/2503.20783

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> fixed_length_mean(torch.tensor([[1.0, 2.0], [6.0, 9.0]]), mask, length=4)
        Parts(total=tensor(9.), count=tensor(8))
    """
    return Parts(masked_sum(losses, mask), torch.tensor(len(mask) * length, device=mask.device))
