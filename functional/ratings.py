"""From many ratings of a text to one number, or to preferences between texts.

Texts have different numbers of raters, so `ratings` (B, N) come with a `mask` (B, N).
"""

import torch
from torch import Tensor

from ._tensors import check_bool, check_same_shape, upcast
from .masking import masked_mean


def mean_rating(ratings: Tensor, mask: Tensor) -> Tensor:
    """The mean rating of each text.

    Args:
        ratings: (B, N).
        mask: bool, True = this rater rated this text, (B, N).

    Returns:
        (B,).

    Raises:
        ValueError: if the shapes differ, or a text has no raters.

    Example:
        >>> import torch
        >>> mean_rating(torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[True, True, True]]))
        tensor([3.])
    """
    _check_rated(ratings, mask)
    return masked_mean(ratings, mask, dim=1)


def median_rating(ratings: Tensor, mask: Tensor) -> Tensor:
    """The median rating of each text; the mean of the two middle ones if their number is even.

    Args:
        ratings: (B, N).
        mask: bool, True = this rater rated this text, (B, N).

    Returns:
        (B,).

    Raises:
        ValueError: if the shapes differ, or a text has no raters.

    Example:
        >>> import torch
        >>> median_rating(torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[True, True, True]]))
        tensor([2.])
    """
    _check_rated(ratings, mask)
    count = mask.sum(dim=1, keepdim=True)  # (B, 1)
    middle = torch.cat([(count - 1) // 2, count // 2], dim=1)  # (B, 2), twice the same if the count is odd
    return _sort_rated(ratings, mask).gather(1, middle).mean(dim=1)


def trimmed_mean_rating(ratings: Tensor, mask: Tensor, trim: float) -> Tensor:
    """The mean rating of each text without its lowest and highest ratings.

    The floor(trim · n) lowest and as many of the highest of n ratings are left out.

    Args:
        ratings: (B, N).
        mask: bool, True = this rater rated this text, (B, N).
        trim: share to leave out at each end, 0 ≤ trim < 0.5; usually 0.1 to 0.25.

    Returns:
        (B,).

    Raises:
        ValueError: if the shapes differ, a text has no raters, or `trim` is out of range.

    Example:
        >>> import torch
        >>> trimmed_mean_rating(torch.tensor([[1.0, 2.0, 4.0, 99.0]]), torch.ones(1, 4, dtype=torch.bool), trim=0.25)
        tensor([3.])
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"`trim` must be at least 0 and less than 0.5, but is {trim}.")
    _check_rated(ratings, mask)
    count = mask.sum(dim=1, keepdim=True)  # (B, 1)
    dropped = (trim * count.double()).floor()  # (B, 1)
    rank = torch.arange(ratings.shape[1], device=ratings.device)  # (N,)
    return masked_mean(_sort_rated(ratings, mask), (rank >= dropped) & (rank < count - dropped), dim=1)


def preference_matrix(ratings: Tensor, mask: Tensor) -> Tensor:
    """How often each text is rated higher than each other, over all pairs of their raters.

    preference[i, j] = mean over raters a of i, b of j of ([rᵢₐ > rⱼ_b] + ½ [rᵢₐ = rⱼ_b])

    The usual target of `soft_bradley_terry_loss`. Memory B · N per text, not B² · N².

    Args:
        ratings: (B, N).
        mask: bool, True = this rater rated this text, (B, N).

    Returns:
        (B, B): entries [i, j] and [j, i] add up to 1, the diagonal is 0.5.

    Raises:
        ValueError: if the shapes differ, or a text has no raters.

    Source:
        The common-language effect size: Vargha and Delaney 2000, "A Critique and Improvement of the CL Common Language
        Effect Size Statistics of McGraw and Wong", https://doi.org/10.3102/10769986025002101

    Example:
        >>> import torch
        >>> preference_matrix(torch.tensor([[2.0, 3.0], [1.0, 2.0]]), torch.ones(2, 2, dtype=torch.bool))
        tensor([[0.5000, 0.8750],
                [0.1250, 0.5000]])
    """
    _check_rated(ratings, mask)
    ordered = _sort_rated(ratings, mask)  # (B, N)
    rows = []
    for rated, counts in zip(upcast(ratings), mask, strict=True):
        own = rated[counts].repeat(len(ratings), 1)  # (B, raters of i)
        below = torch.searchsorted(ordered, own, side="left")
        below_or_equal = torch.searchsorted(ordered, own, side="right")
        wins = (below + below_or_equal).sum(dim=1).to(ordered.dtype) / 2  # (B,), a tie is half a win
        rows.append(wins / (counts.sum() * mask.sum(dim=1)))
    return torch.stack(rows)  # (B, B)


def _sort_rated(ratings: Tensor, mask: Tensor) -> Tensor:
    """Each row sorted, the ratings that count first."""
    return upcast(ratings).masked_fill(~mask, torch.inf).sort(dim=1).values


def _check_rated(ratings: Tensor, mask: Tensor) -> None:
    check_bool(mask=mask)
    check_same_shape(ratings=ratings, mask=mask)
    unrated = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if unrated:
        raise ValueError(f"`mask` must give every text at least one rater, but row {unrated[0]} has none.")
