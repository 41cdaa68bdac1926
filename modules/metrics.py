"""torchmetrics that torchmetrics does not have. Each keeps sums (or whole lists) per rank, so values are global."""

import re
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.utilities import dim_zero_cat

from ..ranks import of_all_ranks

ROWS = 512  # of a table of all pairs, at a time
MOST_SOURCES = 20
OTHER = "other"
_LONGEST_NAME = 60


class Perplexity(MeanMetric):
    """exp of the mean negative log-likelihood per token.

    torchmetrics' own class takes the logits of the whole vocabulary and the log of a probability that may have
    underflowed to zero; this one takes log-probabilities that are already there.
    """

    def compute(self) -> Tensor:
        """The perplexity so far."""
        return super().compute().exp()


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


def over_pairs(scores: Tensor, ratings: Tensor, min_gap: float = 0.0) -> Tensor:
    """Sums over all pairs (i, j) with rating_i − rating_j > min_gap; scores and ratings have shape (N,).

    Returns:
        (3,) float64: in how many of them score_i is higher (equal scores count half), the sum of score_i − score_j, and
        how many there are.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=scores.device)
    for some_scores, some_ratings in zip(scores.split(ROWS), ratings.split(ROWS), strict=True):
        counts = some_ratings[:, None] - ratings > min_gap
        difference = (some_scores[:, None] - scores)[counts].double()
        wins = (difference > 0).sum() + 0.5 * (difference == 0).sum()
        sums += torch.stack([wins.double(), difference.sum(), counts.sum().double()])
    return sums


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
        wins, _, count = over_pairs(dim_zero_cat(self.scores), dim_zero_cat(self.ratings), self.min_gap)
        return wins / count


class PairMargin(PairAgreement):
    """By how much the text that is rated higher has the higher score, a mean over the same pairs."""

    def compute(self) -> Tensor:
        """The mean difference; NaN without a pair that far apart."""
        _, difference, count = over_pairs(dim_zero_cat(self.scores), dim_zero_cat(self.ratings), self.min_gap)
        return difference / count


class SourceAgreement:
    """Agreement with people within each source of the data, over the pairs of all batches and ranks.

    It is no torchmetrics Metric: those have the same states on all ranks, but which sources there are, each rank knows
    only of its own rows. Ranks exchange what they have when it is computed. Of more than `most` sources, those with the
    most pairs have a name of their own, and the pairs within the rest of them are one more, `other`; so are those of
    rows without a source.

    Args:
        most: how many sources have a name of their own.
    """

    def __init__(self, most: int = MOST_SOURCES) -> None:
        self.most = most
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._pairs: dict[str, list[float]] = {}  # those in which the scores are right, and all
        self._texts: dict[str, list[tuple[float, float]]] = {}  # score and rating

    def update_pairs(self, sources: Sequence[str], agreement: Tensor, counts: Tensor) -> None:
        """Add compared pairs: the source, 1 (right), ½ or 0, and whether the pair counts, of each."""
        for source, right, is_counted in zip(sources, agreement.tolist(), counts.tolist(), strict=True):
            if is_counted:
                sums = self._pairs.setdefault(label(source), [0.0, 0.0])
                sums[0], sums[1] = sums[0] + right, sums[1] + 1

    def update_texts(self, sources: Sequence[str], scores: Tensor, ratings: Tensor) -> None:
        """Add rated texts; every two of one source are a pair."""
        for source, score, rating in zip(sources, scores.tolist(), ratings.tolist(), strict=True):
            self._texts.setdefault(label(source), []).append((score, rating))

    def compute(self) -> dict[str, float]:
        """Agreement by source, in order of name; sources without a pair that counts are left out. On all ranks."""
        sums: dict[str, Tensor] = {}
        texts: dict[str, list[tuple[float, float]]] = {}
        for pairs, rated in of_all_ranks((self._pairs, self._texts)):
            for source, values in pairs.items():
                sums[source] = sums.get(source, 0) + torch.tensor(values, dtype=torch.float64)
            for source, values in rated.items():
                texts.setdefault(source, []).extend(values)
        for source, values in texts.items():
            scores, ratings = torch.tensor(values, dtype=torch.float64).unbind(1)
            sums[source] = sums.get(source, 0) + over_pairs(scores, ratings)[[0, 2]]
        named = {source: values for source, values in sums.items() if values[1] > 0}
        most_first = sorted(named.keys() - {OTHER}, key=lambda source: (-named[source][1], source))
        if rest := [named.pop(source) for source in [*most_first[self.most :], OTHER] if source in named]:
            named[OTHER] = sum(rest)
        return {source: float(right / count) for source, (right, count) in sorted(named.items())}

    def log(self, module: L.LightningModule, name: str) -> None:
        """Log it as `name`/<source> at the end of an evaluation, and begin anew. On all ranks."""
        for source, value in self.compute().items():
            module.log(f"{name}/{source}", value, sync_dist=True)  # equal on all ranks
        self.reset()


def label(source: str) -> str:
    """A source as a part of a metric's name: letters, digits, `_`, `-` and `.`, not too long."""
    return re.sub(r"[^\w.-]+", "_", source)[:_LONGEST_NAME].strip("_") or OTHER


class MeanDifference(Metric):
    """The mean of one kind of items less that of the other, each over all items seen; NaN without both."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2, 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, is_first: Tensor) -> None:
        """Add items: their values (B,) and which of them are of the first kind (B,)."""
        kinds = torch.stack([is_first, ~is_first]).double()
        self.sums = self.sums + torch.stack([(kinds * values.detach().double()).sum(1), kinds.sum(1)])

    def compute(self) -> Tensor:
        """The difference so far."""
        first, second = self.sums[0] / self.sums[1]
        return (first - second).float()


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
