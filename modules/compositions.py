"""What a policy-gradient method is composed of: an advantage, an objective, an aggregation. Any three go together.

====================  ===================  ===================  ================
method                advantage            objective            aggregation
====================  ===================  ===================  ================
GRPO                  GroupNormalized      TokenRatio           SequenceMean
Dr. GRPO              GroupCentered        TokenRatio           FixedLengthMean
DAPO                  GroupNormalized      TokenRatio           TokenMean
GSPO                  GroupNormalized      SequenceRatio        SequenceMean
RLOO                  LeaveOneOut          TokenRatio           TokenMean
REINFORCE++           WhitenedReturns      TokenRatio           TokenMean
REINFORCE++-baseline  WhitenedGroupScores  TokenRatio           TokenMean
====================  ===================  ===================  ================

(DAPO has a wider clip range above, RLOO and REINFORCE++ have the KL in the reward: see `configs/`.)
"""

from abc import ABC, abstractmethod

from torch import Tensor

from ..functional import (
    Parts,
    clipped_policy_loss,
    fixed_length_mean,
    group_centered,
    group_normalized,
    is_clipped,
    leave_one_out,
    masked_sum,
    returns_to_go,
    sequence_logprobs,
    sequence_mean,
    token_mean,
    whiten,
)
from ..functional.masking import Reduce
from .checks import require


class Advantage(ABC):
    """From rewards per token to advantages per token, without a value model."""

    needs_groups = True

    @abstractmethod
    def __call__(self, rewards: Tensor, mask: Tensor, group_size: int, reduce: Reduce) -> Tensor:
        """(B, T) advantages from (B, T) rewards; rows of a group stand next to each other."""


class GroupNormalized(Advantage):
    """(R_i − mean of the group) / (its standard deviation + eps), at every token (GRPO).

    Args:
        eps: keeps a group whose rewards are all equal at 0.
    """

    def __init__(self, eps: float = 1e-4) -> None:
        require("eps", eps > 0, "above 0", eps)
        self.eps = eps

    def __call__(self, rewards: Tensor, mask: Tensor, group_size: int, reduce: Reduce) -> Tensor:
        """(B, T)."""
        return _at_every_token(group_normalized(masked_sum(rewards, mask, dim=1), group_size, self.eps), mask)


class GroupCentered(Advantage):
    """R_i − mean of the group, at every token (Dr. GRPO)."""

    def __call__(self, rewards: Tensor, mask: Tensor, group_size: int, reduce: Reduce) -> Tensor:
        """(B, T)."""
        return _at_every_token(group_centered(masked_sum(rewards, mask, dim=1), group_size), mask)


class LeaveOneOut(Advantage):
    """R_i − mean of the others of the group, at every token (RLOO)."""

    def __call__(self, rewards: Tensor, mask: Tensor, group_size: int, reduce: Reduce) -> Tensor:
        """(B, T)."""
        return _at_every_token(leave_one_out(masked_sum(rewards, mask, dim=1), group_size), mask)


class WhitenedReturns(Advantage):
    """The rewards still to come at each token, whitened over all tokens of all ranks (REINFORCE++).

    Args:
        gamma: discount per token.
    """

    needs_groups = False

    def __init__(self, gamma: float = 1.0) -> None:
        require("gamma", 0 <= gamma <= 1, "between 0 and 1", gamma)
        self.gamma = gamma

    def __call__(self, rewards: Tensor, mask: Tensor, group_size: int, reduce: Reduce) -> Tensor:
        """(B, T)."""
        return whiten(returns_to_go(rewards, mask, self.gamma), mask, reduce)


class WhitenedGroupScores(GroupCentered):
    """R_i − mean of the group, whitened over all tokens of all ranks (REINFORCE++-baseline)."""

    def __call__(self, rewards: Tensor, mask: Tensor, group_size: int, reduce: Reduce) -> Tensor:
        """(B, T)."""
        return whiten(super().__call__(rewards, mask, group_size, reduce), mask, reduce)


class Objective(ABC):
    """The loss per token, from the ratio of the policy to the one that sampled, ρ, clipped to stay near 1.

    Args:
        clip_range: ρ is cut at 1 − this.
        clip_range_high: ρ is cut at 1 + this; None is `clip_range`.
    """

    def __init__(self, clip_range: float, clip_range_high: float | None) -> None:
        require("clip_range", clip_range > 0, "above 0", clip_range)
        require("clip_range_high", clip_range_high is None or clip_range_high > 0, "above 0 or None", clip_range_high)
        self.bounds = clip_range, clip_range_high

    @abstractmethod
    def log_ratio_parts(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the ratio is taken of, both (B, T): ρ = exp(first − second)."""

    def loss(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """(B, T)."""
        return clipped_policy_loss(*self.log_ratio_parts(logprobs, old_logprobs, mask), advantages, *self.bounds)

    def is_clipped(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """(B, T), 1 where the ratio is out of bounds, else 0."""
        return is_clipped(*self.log_ratio_parts(logprobs, old_logprobs, mask), *self.bounds)


class TokenRatio(Objective):
    """Each token has its own ratio (PPO, GRPO).

    Args:
        clip_range: ρ is cut at 1 − this. Usual: 0.2.
        clip_range_high: ρ is cut at 1 + this, 0.28 in DAPO ("clip higher"); None is `clip_range`.
    """

    def __init__(self, clip_range: float = 0.2, clip_range_high: float | None = None) -> None:
        super().__init__(clip_range, clip_range_high)

    def log_ratio_parts(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The log-probabilities as they are."""
        return logprobs, old_logprobs


class SequenceRatio(Objective):
    """All tokens of a response have one ratio, the geometric mean of theirs (GSPO).

    Args:
        clip_range: ρ is cut at 1 − this. Usual: 3e-4, since a mean over tokens moves little.
        clip_range_high: ρ is cut at 1 + this. Usual: 4e-4; None is `clip_range`.
    """

    def __init__(self, clip_range: float = 3e-4, clip_range_high: float | None = 4e-4) -> None:
        super().__init__(clip_range, clip_range_high)

    def log_ratio_parts(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Their means over each response."""
        return sequence_logprobs(logprobs, mask), sequence_logprobs(old_logprobs, mask)


class Aggregation(ABC):
    """From losses per token to one number, in two parts so that micro-batches and ranks add up."""

    @abstractmethod
    def __call__(self, losses: Tensor, mask: Tensor) -> Parts:
        """Sum and count."""


class TokenMean(Aggregation):
    """Every token weighs the same: the mean over all tokens of the optimizer step (DAPO, PPO)."""

    def __call__(self, losses: Tensor, mask: Tensor) -> Parts:
        """Sum over tokens, number of tokens."""
        return token_mean(losses, mask)


class SequenceMean(Aggregation):
    """Every response weighs the same, whatever its length (GRPO, GSPO)."""

    def __call__(self, losses: Tensor, mask: Tensor) -> Parts:
        """Sum of the responses' means, number of responses."""
        return sequence_mean(losses, mask)


class FixedLengthMean(Aggregation):
    """The sum over tokens divided by a constant (Dr. GRPO).

    Args:
        length: the constant, per response; usually `max_new_tokens`.
    """

    def __init__(self, length: int) -> None:
        require("length", length >= 1, "at least 1", length)
        self.length = length

    def __call__(self, losses: Tensor, mask: Tensor) -> Parts:
        """Sum over tokens, number of responses times `length`."""
        return fixed_length_mean(losses, mask, self.length)


def _at_every_token(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.unsqueeze(1) * mask
