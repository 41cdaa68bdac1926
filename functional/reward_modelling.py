"""Reward models from rankings and from ratings on an ordered scale; pairs are in `losses.py`.

Here `K` is the number of responses in the longest list, or the number of levels of a rating scale.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ._tensors import check_bool, check_one_per_row, check_same_shape, upcast

# A level that nobody ever chose is best described by an empty interval, whose log-probability is −∞. This is the least
# width of an interval between thresholds, in logits; under it lies a probability of at most 0.00025.
MIN_WIDTH = 1e-3


def plackett_luce_loss(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of a ranking, per list: the best is chosen from all, the next from the rest, and so on.

    loss = −Σ_k log( exp s_(k) / Σ_{j ≥ k} exp s_(j) ),  s_(1), s_(2), ... the scores from best to worst

    Ties go by Efron's rule. Of d items that share a rank, each is a fraction of itself in the sums of the others: the
    l-th sum, l = 0 .. d − 1, counts all d with weight 1 − l/d. That is, up to a constant, close to the mean over all
    orders of the tied items. It draws their scores together; the order in which they are given does not matter.

    A list of two without a tie is `bradley_terry_loss`; probabilities exp(−loss) of all orders of a list sum to 1.

    Args:
        scores: (B, K).
        ranks: 1 is best; only their order counts, equal ones are ties, (B, K).
        mask: bool, True = an item of this list, (B, K).

    Returns:
        (B,).

    Raises:
        ValueError: if the shapes differ or `mask` is not bool.

    Source:
        Plackett 1975, "The Analysis of Permutations", https://doi.org/10.2307/2346567; ties: Efron 1977, "The
        Efficiency of Cox's Likelihood Function for Censored Data", https://doi.org/10.1080/01621459.1977.10480613.
        As the loss of a reward model: Zhu et al. 2023, "Principled Reinforcement Learning with Human Feedback from
        Pairwise or K-wise Comparisons", https://arxiv.org/abs/2301.11270

    Example:
        >>> import torch
        >>> scores, mask = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([[True] * 3, [True] * 3])
        >>> plackett_luce_loss(scores, torch.tensor([[2, 1, 3], [1, 2, 3]]), mask)
        tensor([0.9327, 1.7918])
    """
    check_bool(mask=mask)
    check_same_shape(scores=scores, ranks=ranks, mask=mask)
    scores = upcast(scores).masked_fill(~mask, 0)
    both = mask[:, :, None] & mask[:, None, :]  # (B, K, K), [b, i, j]: i is chosen from a set that may hold j
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    tied = both & (ranks[:, :, None] == ranks[:, None, :]) | itself
    below = both & (ranks[:, :, None] < ranks[:, None, :])
    gone = tied.tril(-1).sum(2) / tied.sum(2)  # (B, K), l/d: as if tied items left in the order given
    weight = below + tied * (1 - gone[:, :, None]).to(scores.dtype)  # of j in the sum that i is chosen from
    losses = (scores[:, None, :] + weight.log()).logsumexp(2) - scores  # (B, K)
    return losses.masked_fill(~mask, 0).sum(1)


def rating_shares(ratings: Tensor, mask: Tensor, levels: Tensor) -> Tensor:
    """Share of a text's raters who chose each level of the scale.

    Args:
        ratings: (B, N).
        mask: bool, True = this rater rated this text, (B, N).
        levels: the ratings that there are, (K,).

    Returns:
        (B, K), each row sums to 1.

    Raises:
        ValueError: if the shapes differ, a text has no raters, or a rating is none of the levels.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, True, True, False]])
        >>> rating_shares(torch.tensor([[2.0, 3.0, 3.0, 0.0]]), mask, levels=torch.tensor([1.0, 2.0, 3.0]))
        tensor([[0.0000, 0.3333, 0.6667]])
    """
    check_bool(mask=mask)
    check_same_shape(ratings=ratings, mask=mask)
    ratings = upcast(ratings)
    chosen = (ratings[:, :, None] == levels.to(ratings.dtype)) & mask[:, :, None]  # (B, N, K)
    strange = mask & ~chosen.any(2)
    if strange.any():
        row = int(strange.any(1).nonzero()[0])
        raise ValueError(
            f"`ratings` must be among the levels {levels.tolist()}, but text {row} of the batch (the first is 0) has "
            f"the rating {float(ratings[row][strange[row]][0]):g}."
        )
    if not mask.any(1).all():
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"`mask` must give every text at least one rater, but row {row} has none.")
    return chosen.sum(1).to(ratings.dtype) / mask.sum(1, keepdim=True)


def ordered_thresholds(free: Tensor) -> Tensor:
    """Increasing thresholds from numbers that may be anything, so that an optimizer cannot put them out of order.

    b_1 = free_1,  b_{k+1} = b_k + softplus(free_{k+1}) + 0.001

    Args:
        free: (K − 1,).

    Returns:
        (K − 1,), increasing.

    Example:
        >>> import torch
        >>> ordered_thresholds(torch.tensor([-1.0, 0.0, 0.0]))
        tensor([-1.0000, -0.3059,  0.3883])
    """
    free = upcast(free)
    return torch.cat([free[:1], softplus(free[1:]) + MIN_WIDTH]).cumsum(0)


def free_thresholds(thresholds: Tensor) -> Tensor:
    """The inverse of `ordered_thresholds`.

    Args:
        thresholds: (K − 1,), increasing by more than 0.001.

    Returns:
        (K − 1,).

    Raises:
        ValueError: if they do not increase by more than 0.001.

    Example:
        >>> import torch
        >>> free_thresholds(ordered_thresholds(torch.tensor([-1.0, 0.0, 2.0])))
        tensor([-1.,  0.,  2.])
    """
    widths = upcast(thresholds).diff() - MIN_WIDTH
    if not (widths > 0).all():
        raise ValueError(f"`thresholds` must increase by more than {MIN_WIDTH}, but are {thresholds.tolist()}.")
    return torch.cat([upcast(thresholds)[:1], widths + (-(-widths).expm1()).log()])


def ordinal_logprobs(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Log-probability of each level of a rating scale: the cumulative logit, or proportional odds, model.

    P(rating ≤ level k) = σ(b_k − score),  log P(rating = level k) = log( σ(b_k − score) − σ(b_{k−1} − score) )

    with b_0 = −∞ and b_K = ∞. A rater sees the score plus logistic noise, and thresholds cut the line into levels.

    Args:
        scores: (B,).
        thresholds: b_1 .. b_{K−1}, increasing, (K − 1,).

    Returns:
        (B, K).

    Source:
        McCullagh 1980, "Regression Models for Ordinal Data", https://doi.org/10.1111/j.2517-6161.1980.tb01109.x

    Example:
        >>> import torch
        >>> ordinal_logprobs(torch.tensor([0.0]), torch.tensor([-1.0986, 1.0986])).exp()
        tensor([[0.2500, 0.5000, 0.2500]])
    """
    thresholds = upcast(thresholds)
    upper = thresholds - upcast(scores)[:, None]  # (B, K − 1)
    below, above = logsigmoid(upper), logsigmoid(-upper)
    # σ(u) − σ(l) = σ(u) σ(−l) (1 − exp(l − u)), which loses no digits where both are close to 0, or to 1.
    between = below[:, 1:] + above[:, :-1] + (-(-thresholds.diff()).expm1()).log()
    return torch.cat([below[:, :1], between, above[:, -1:]], dim=1)


def ordinal_loss(scores: Tensor, thresholds: Tensor, shares: Tensor) -> Tensor:
    """Mean negative log-likelihood of a text's ratings under `ordinal_logprobs`, per text.

    loss = −Σ_k share_k · log P(rating = level k)

    Args:
        scores: (B,).
        thresholds: increasing, (K − 1,).
        shares: of the raters who chose each level, (B, K).

    Returns:
        (B,).

    Raises:
        ValueError: if the shapes do not go together.

    Source:
        McCullagh 1980, as `ordinal_logprobs`.

    Example:
        >>> import torch
        >>> thresholds, shares = torch.tensor([0.0, 1.0986]), torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]])
        >>> ordinal_loss(torch.zeros(2), thresholds, shares)
        tensor([0.6931, 1.0397])
    """
    check_one_per_row("shares", shares, scores=scores)
    if shares.shape[1] != len(thresholds) + 1:
        raise ValueError(f"`shares` must have {len(thresholds) + 1} columns, one more than thresholds: {shares.shape}.")
    return -(upcast(shares) * ordinal_logprobs(scores, thresholds)).sum(1)
