"""torchmetrics that torchmetrics does not have. Each keeps sums (or whole lists) per rank, so values are global."""

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.utilities import dim_zero_cat


class Perplexity(MeanMetric):
    """exp of the mean negative log-likelihood per token.

    torchmetrics' own class takes the logits of the whole vocabulary and the log of a probability that may have
    underflowed to zero; this one takes log-probabilities that are already there.
    """

    def compute(self) -> Tensor:
        """The perplexity so far."""
        return super().compute().exp()


class Mean(Metric):
    """The mean of all items seen; sum and count stay apart, so batches of unequal size count as they should.

    torchmetrics' own takes weights, but drops them without a word when its NaN check is off; and the check drops NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Add `count` items that sum to `total`, both scalars."""
        self.sums = self.sums + torch.stack([total.detach().double(), count.double()])

    def compute(self) -> Tensor:
        """The mean so far; NaN of nothing."""
        total, count = self.sums
        return (total / count).float()


class Moments(Metric):
    """Mean and standard deviation (biased) of all values seen, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add values of any shape."""
        values = values.detach().double()
        self.sums = self.sums + torch.stack([torch.ones_like(values).sum(), values.sum(), values.square().sum()])

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation."""
        count, total, squares = self.sums
        mean = total / count
        return mean, (squares / count - mean.square()).clamp(min=0).sqrt()


class PairAgreement(Metric):
    """Share of all pairs of texts that scores order as the ratings do; equal scores count half.

    Over pairs (i, j) with rating_i − rating_j > min_gap. With min_gap = 0 it is (τ_a + 1) / 2 on pairs without ties,
    Kendall's τ on another scale. One human against the crowd is the natural yardstick.
    """

    def __init__(self, min_gap: float = 0.0) -> None:
        super().__init__()
        self.min_gap = min_gap
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("ratings", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, ratings: Tensor) -> None:
        """Add texts: scores (B,) and ratings (B,)."""
        self.scores.append(scores.detach())
        self.ratings.append(ratings.detach())

    def compute(self) -> Tensor:
        """The share; NaN without a pair that far apart."""
        scores, ratings = dim_zero_cat(self.scores), dim_zero_cat(self.ratings)
        higher = ratings[:, None] - ratings[None, :] > self.min_gap
        difference = scores[:, None] - scores[None, :]
        return ((difference > 0).double() + 0.5 * (difference == 0))[higher].mean()


class CalibrationError(Metric):
    """Expected calibration error of probabilities against labels in [0, 1] (hard, or shares of raters).

    ECE = Σ_bins share of bin · |mean probability − mean label|  (Guo et al. 2017, https://arxiv.org/abs/1706.04599)

    `reliability` is what a reliability diagram shows, of the last `compute`: per bin the count, the mean probability
    and the mean label, (num_bins, 3), NaN where a bin is empty. It outlives `reset`; None before the first.
    """

    reliability: Tensor | None = None

    def __init__(self, num_bins: int = 10) -> None:
        super().__init__()
        self.num_bins = num_bins
        self.add_state("sums", torch.zeros(num_bins, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add predictions: both of shape (N,)."""
        p, y = probabilities.detach().double(), labels.double()
        bins = (p * self.num_bins).long().clamp(max=self.num_bins - 1)
        self.sums = self.sums.index_add(0, bins, torch.stack([torch.ones_like(p), p, y], dim=1))

    def compute(self) -> Tensor:
        """The error, 0 is perfect."""
        count, p, y = self.sums.unbind(1)
        self.reliability = torch.stack([count, p / count, y / count], dim=1).cpu()
        return (p - y).abs().sum() / count.sum()


class PairCalibrationError(CalibrationError):
    """The same of the probabilities that one text of a pair is preferred.

    Every pair enters in both orders, (p, y) and (1 − p, 1 − y): which text is called the first is arbitrary.
    """

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add pairs: both of shape (N,)."""
        super().update(torch.cat([probabilities, 1 - probabilities]), torch.cat([labels, 1 - labels]))
