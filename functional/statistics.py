"""What a set of numbers says, and how surely: correlation, wins, bootstrap intervals."""

import torch
from torch import Tensor


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation, in float64.

    Σ (x − x̄)(y − ȳ) / √(Σ (x − x̄)² · Σ (y − ȳ)²)

    Args:
        x: (N,).
        y: (N,).

    Returns:
        a scalar from −1 to 1; NaN if all of `x` or all of `y` are equal.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import torch
        >>> correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]))
        tensor(1., dtype=torch.float64)
    """
    if x.shape != y.shape:
        raise ValueError(f"`x` and `y` must have the same shape, but got {tuple(x.shape)} and {tuple(y.shape)}.")
    x, y = x.double(), y.double()
    if (x == x[:1]).all() or (y == y[:1]).all():  # exactly so: else rounding of the mean passes for a spread
        return torch.tensor(torch.nan, dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()


def wins(scores: Tensor, others: Tensor) -> Tensor:
    """1 where a score is above the other, ½ where they are equal, else 0.

    Args:
        scores: (N,).
        others: (N,) of what is compared with.

    Returns:
        (N,) float64; their mean is the win rate.

    Example:
        >>> import torch
        >>> wins(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]))
        tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    return (1 + (scores - others).double().sign()) / 2


def bootstrap_interval(
    values: Tensor, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of independent values.

    Args:
        values: (N,).
        level: share of resampled means within, 0 to 1.
        resamples: how many times N values are drawn with replacement.
        seed: of a generator of its own: no other random numbers are touched.

    Returns:
        lower and upper end.

    Source:
        Efron 1979, "Bootstrap Methods: Another Look at the Jackknife".

    Example:
        >>> import torch
        >>> bootstrap_interval(torch.tensor([1.0, 1.0, 1.0]))
        (1.0, 1.0)
    """
    values = values.double().cpu()
    picks = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = values[picks].mean(1).quantile(ends).tolist()
    return low, high
