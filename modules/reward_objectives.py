"""What a reward model may learn from what people said: each objective is a loss on raw scores.

    --model.objective OrdinalRatings --model.objective.levels [0,1,2,3,4]

To add one, derive from `RewardObjective` and name it by its dotted path.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..functional import (
    free_thresholds,
    mean_rating,
    ordered_thresholds,
    ordinal_logprobs,
    ordinal_loss,
    plackett_luce_loss,
    preference_matrix,
    rating_shares,
    soft_bradley_terry_loss,
)
from .checks import require


class Comparisons(NamedTuple):
    """Pairs of texts (i, j) that people compared; each field has shape (M,)."""

    difference: Tensor
    """Score of i minus score of j."""
    preference: Tensor
    """Share of people who prefer i, in [0, 1]."""
    margin: Tensor
    """By how much i should win."""
    gap: Tensor
    """By how much people put i above j: a margin, or a difference of ranks."""
    row: Tensor
    """Number of the pair's row in the batch: of the pair, of its list, or of text i."""

    @property
    def decided(self) -> Tensor:
        """Whether more people prefer one than the other."""
        return self.preference != 0.5

    @property
    def agreement(self) -> Tensor:
        """1 where the scores prefer the text that most people prefer, 1/2 at equal scores, else 0."""
        return (1 + self.lead.sign()) / 2

    @property
    def lead(self) -> Tensor:
        """By how much the score of the text that most people prefer is higher; 0 where they do not prefer one."""
        return self.difference * (self.preference - 0.5).sign()


class Levels(NamedTuple):
    """Levels of a rating scale, for each text; both of shape (N, K)."""

    probabilities: Tensor
    shares: Tensor
    """Of the text's raters."""


class Judged(NamedTuple):
    """What an objective says of a batch."""

    losses: Tensor
    """Per item: its mean is the loss. An item is a pair, a list, or a text."""
    pairs: Comparisons
    """On which the agreement with people is reported."""
    levels: Levels | None = None


class RewardObjective(nn.Module):
    """Base: from the raw scores of a batch to losses.

    A subclass says what `forward` is. Its parameters, if it has any, are trained with the network and saved in its
    checkpoints.
    """

    learning_rate: float | None = None
    """Of the parameters; None is the module's."""

    def forward(self, raw: Tensor, batch: dict[str, Tensor]) -> Judged:
        """Losses of a batch.

        Args:
            raw: scores (N,), not normalised.
            batch: of a DataModule of pairs, ratings or rankings.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What goes into the exported model's config, as `reward_objective`; plain values."""
        return {}

    def start_from(self, settings: dict[str, Any]) -> None:
        """Take over what an exported model's config says."""


class Preferences(RewardObjective):
    """The negative log-likelihood of what people preferred. Batches say by what they hold how that was asked.

    Pairs, and every two rated texts of a batch: Bradley-Terry, with the share of people as a soft label. Ranked lists:
    Plackett-Luce. A mean over pairs, or over lists.
    """

    def forward(self, raw: Tensor, batch: dict[str, Tensor]) -> Judged:
        """Losses of pairs or lists."""
        pairs = compare(raw, batch)
        if "rank" in batch:
            return Judged(plackett_luce_loss(*lists(batch["group"], raw, batch["rank"])), pairs)
        return Judged(soft_bradley_terry_loss(pairs.difference, pairs.preference, pairs.margin), pairs)


class RatingRegression(RewardObjective):
    """Squared error between score and mean rating: a mean over texts of (score − (rating − center) / scale)².

    The expected rating of a text is center + scale · its raw score.

    Source: Wang et al. 2024, "HelpSteer2", https://arxiv.org/abs/2406.08673, train so, with one score per attribute.

    Args:
        center: the rating that is a score of 0. A good choice is the middle of the scale, or the data's mean.
        scale: by how much ratings differ where scores differ by 1. A good choice is their standard deviation.
    """

    def __init__(self, center: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        require("scale", scale > 0, "above 0", scale)
        self.center, self.scale = center, scale

    def forward(self, raw: Tensor, batch: dict[str, Tensor]) -> Judged:
        """Losses of rated texts."""
        target = (mean_rating(*ratings_of(batch, self)) - self.center) / self.scale
        return Judged((raw - target).square(), compare(raw, batch))

    def settings(self) -> dict[str, Any]:
        """Center and scale: with them the score is a rating."""
        return {"class": type(self).__name__, "center": self.center, "scale": self.scale}


class OrdinalRatings(RewardObjective):
    """Ratings as levels in order, of which nothing is known but the order: the cumulative logit model.

    P(rating ≤ level k) = σ(b_k − score); the thresholds b_1 < b_2 < ... are trained with the network. Loss: the mean
    over a text's raters of −log P(its rating), then a mean over texts.

    Source: McCullagh 1980, "Regression Models for Ordinal Data",
    https://doi.org/10.1111/j.2517-6161.1980.tb01109.x

    Args:
        levels: the ratings that there are, from worst to best.
        thresholds: where they start, one less than levels, increasing; None is where all levels have the same
            probability at a score of 0. Those of an exported model with the same levels go on where they are.
        learning_rate: of the thresholds; None is the module's. They move by about this much a step, and have a way of
            1 or so before them: with the small learning rates of large networks, give 1e-3 to 1e-2.
    """

    def __init__(
        self, levels: list[float], thresholds: list[float] | None = None, learning_rate: float | None = None
    ) -> None:
        super().__init__()
        increasing = all(a < b for a, b in pairwise(levels))
        require("levels", len(levels) >= 2 and increasing, "at least two numbers that increase", levels)
        given = thresholds is not None
        require("thresholds", not given or len(thresholds) == len(levels) - 1, f"{len(levels) - 1} numbers", thresholds)
        self.levels, self.learning_rate, self._is_given = [float(level) for level in levels], learning_rate, given
        at_most = [k / len(levels) for k in range(1, len(levels))]  # P(rating ≤ level k)
        self._start(thresholds if given else [math.log(p / (1 - p)) for p in at_most])

    def _start(self, thresholds: list[float]) -> None:
        # On the CPU, also where the networks around it are built as shapes only.
        self.free = nn.Parameter(free_thresholds(torch.tensor(thresholds, dtype=torch.float64, device="cpu")).float())

    def forward(self, raw: Tensor, batch: dict[str, Tensor]) -> Judged:
        """Losses of rated texts."""
        thresholds = ordered_thresholds(self.free)
        shares = rating_shares(*ratings_of(batch, self), torch.tensor(self.levels, device=raw.device))
        levels = Levels(ordinal_logprobs(raw, thresholds).detach().exp(), shares)
        return Judged(ordinal_loss(raw, thresholds, shares), compare(raw, batch), levels)

    def settings(self) -> dict[str, Any]:
        """Levels and thresholds: with them the raw score is a probability of each level. On all ranks."""
        with torch.inference_mode(False), torch.no_grad():
            free = self.free.full_tensor() if isinstance(self.free, DTensor) else self.free
        thresholds = ordered_thresholds(free.detach().double()).tolist()
        return {"class": type(self).__name__, "levels": self.levels, "thresholds": thresholds}

    def start_from(self, settings: dict[str, Any]) -> None:
        """Go on with the thresholds of an exported model, unless others are given or it has other levels."""
        if settings.get("levels") == self.levels and not self._is_given:
            self._start(settings["thresholds"])


def compare(raw: Tensor, batch: dict[str, Tensor]) -> Comparisons:
    """The pairs of a batch: given ones; of ratings, every text and every other; of lists, those of different rank."""
    if "ratings" in batch:
        i, j = torch.triu_indices(len(raw), len(raw), offset=1, device=raw.device)
        preference = preference_matrix(batch["ratings"], batch["ratings_mask"])[i, j]
        return Comparisons(raw[i] - raw[j], preference, *[torch.zeros_like(preference)] * 2, i)
    if "rank" in batch:
        group, rank = batch["group"], batch["rank"]
        i, j = ((group[:, None] == group) & (rank[:, None] < rank)).nonzero(as_tuple=True)
        difference = raw[i] - raw[j]
        ones = torch.ones_like(difference)
        return Comparisons(difference, ones, torch.zeros_like(difference), rank[j] - rank[i], group[i])
    chosen, rejected = raw.chunk(2)
    preference = batch.get("preference", torch.ones_like(chosen))
    row = torch.arange(len(chosen), device=chosen.device)
    return Comparisons(chosen - rejected, preference, batch["margin"], batch["margin"], row)


def lists(group: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Values (N,) of lists that come one after the other, as matrices (B, K), and the mask of their entries."""
    sizes = group.bincount()
    place = torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group]
    mask = torch.arange(int(sizes.max()), device=group.device) < sizes[:, None]
    return *(v.new_zeros(mask.shape).index_put((group, place), v) for v in values), mask


def ratings_of(batch: dict[str, Tensor], objective: RewardObjective) -> tuple[Tensor, Tensor]:
    """Ratings and their mask.

    Raises:
        ValueError: if the batch holds none.
    """
    if "ratings" not in batch:
        raise ValueError(
            f"`objective`: {type(objective).__name__} learns from ratings, but the batch holds {sorted(batch)}: use "
            "`--data RatingDataModule`, or leave the objective out."
        )
    return batch["ratings"], batch["ratings_mask"]
