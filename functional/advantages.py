"""How much better than expected each token was."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._tensors import check_bool, check_one_per_row, check_same_shape, upcast


class AdvantageEstimate(NamedTuple):
    """What `gae` returns: both (B, T), 0 outside the mask."""

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    gae_lambda: float,
    bootstrap_value: Tensor | None = None,
) -> AdvantageEstimate:
    """Generalized advantage estimation over the tokens that count; the others are skipped.

    δ_t = rewards_t + γ values_{t+1} − values_t
    advantages_t = Σ_{k≥0} (γλ)^k δ_{t+k}
    returns_t = advantages_t + values_t

    The value after the last response token is `bootstrap_value`, or 0: the response has ended. Our rewards_t arrives
    after token t and is what the paper calls r_t.

    Args:
        rewards: (B, T).
        values: of the state before each token, (B, T).
        mask: bool, True = counts, (B, T).
        gamma: discount, usually 1.
        gae_lambda: 0 for TD errors (low variance), 1 for Monte Carlo returns (no bias); usually 0.95.
        bootstrap_value: value after the last response token, for responses cut off by the length limit and 0 for
            those that ended, (B,).

    Returns:
        `advantages` and `returns`, both (B, T), 0 outside the mask; not whitened.

    Raises:
        ValueError: if the shapes do not fit or `mask` is not bool.

    Source:
        Schulman et al. 2015, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
        equation 16, https://arxiv.org/abs/1506.02438

    Example:
        >>> import torch
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
        >>> gae(rewards, values, torch.tensor([[True, True]]), gamma=1.0, gae_lambda=1.0)
        AdvantageEstimate(advantages=tensor([[0.5000, 0.7500]]), returns=tensor([[1., 1.]]))
    """
    check_bool(mask=mask)
    check_same_shape(rewards=rewards, values=values, mask=mask)
    rewards, values = upcast(rewards), upcast(values)
    next_value = values.new_zeros(len(values)) if bootstrap_value is None else upcast(bootstrap_value)  # (B,)
    check_one_per_row("values", values, bootstrap_value=next_value)

    advantage = values.new_zeros(len(values))  # (B,)
    advantages = torch.zeros_like(values)  # (B, T)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    return AdvantageEstimate(
        advantages=torch.where(mask, advantages, 0.0), returns=torch.where(mask, advantages + values, 0.0)
    )
