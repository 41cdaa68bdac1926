"""What held-out texts say of a reward model: agreement with people, calibration, and how much of it is length."""

import warnings
from typing import Any

from torch import Tensor, nn
from torchmetrics import PearsonCorrCoef, SpearmanCorrCoef

from ..functional import mean_rating
from .metrics import CalibrationError, PairAgreement, PairCalibrationError, PairMargin, SourceAgreement
from .reward_objectives import Judged, compare
from .text_module import TextModule


class RewardEvaluation(nn.Module):
    """The metrics of a reward model's validation and test.

    Args:
        gaps: agreement is reported for all pairs, and for those further apart than each of these.
    """

    def __init__(self, gaps: tuple[float, ...]) -> None:
        super().__init__()
        self.calibration, self.level_calibration = PairCalibrationError(), CalibrationError()
        with warnings.catch_warnings():  # that ranks need all values in memory: one number per held-out text
            warnings.simplefilter("ignore")
            self.correlations = nn.ModuleDict({"pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef()})
            self.length_correlation = SpearmanCorrCoef()
        self.agreements = nn.ModuleDict({agreement_name(gap): PairAgreement(gap) for gap in (0.0, *gaps)})
        self.length_agreement, self.margin = PairAgreement(), PairMargin()
        self.by_source = SourceAgreement()

    @property
    def reliability(self) -> dict[str, Tensor]:
        """Of the last evaluation, what its reliability diagrams show: `pairs`, and of ordinal models `levels`."""
        found = {"pairs": self.calibration.reliability, "levels": self.level_calibration.reliability}
        return {name: rows for name, rows in found.items() if rows is not None}

    def log(self, module: TextModule, stage: str, raw: Tensor, judged: Judged, batch: dict[str, Any]) -> None:
        """Add a batch of raw scores, and log everything under `stage/`."""
        lengths = batch["attention_mask"].sum(1).to(raw.dtype)
        pairs, levels = judged.pairs, judged.levels
        module.log_mean(f"{stage}/loss", judged.losses, batch_size=1)
        module.log_range(f"{stage}/raw", raw, batch_size=1)
        self.length_correlation.update(raw, lengths)
        self.calibration.update(pairs.difference.sigmoid(), pairs.preference)
        metrics = {"length_correlation": self.length_correlation, "calibration_error": self.calibration}
        if levels is not None:
            self.level_calibration.update(levels.probabilities.flatten(), levels.shares.flatten())
            metrics["level_calibration_error"] = self.level_calibration
        if "ratings" in batch:
            metrics |= self._of_ratings(raw, lengths, batch)
        else:
            self._log_pairs(module, stage, judged, batch, compare(lengths, batch).agreement)
        for name, metric in metrics.items():
            module.log(f"{stage}/{name}", metric, on_epoch=True, batch_size=1, prog_bar=name == "agreement")

    def _of_ratings(self, raw: Tensor, lengths: Tensor, batch: dict[str, Any]) -> dict[str, nn.Module]:
        """Over every two texts of all batches and ranks."""
        rating = mean_rating(batch["ratings"], batch["ratings_mask"])
        self.length_agreement.update(lengths, rating)
        if "source" in batch:
            self.by_source.update_texts(batch["source"], raw, rating)
        metrics = {**self.agreements, **self.correlations, "margin": self.margin}
        for metric in metrics.values():
            metric.update(raw, rating)
        return metrics | {"agreement_length_baseline": self.length_agreement}

    def _log_pairs(
        self, module: TextModule, stage: str, judged: Judged, batch: dict[str, Any], longer_is_better: Tensor
    ) -> None:
        """Over the pairs that people compared."""
        pairs = judged.pairs
        if "source" in batch:
            sources = [batch["source"][row] for row in pairs.row.tolist()]
            self.by_source.update_pairs(sources, pairs.agreement, pairs.decided)
        for name, metric in self.agreements.items():
            counts = pairs.decided & (pairs.gap > metric.min_gap if metric.min_gap else True)
            module.log_mean(f"{stage}/{name}", pairs.agreement, counts, batch_size=1, prog_bar=name == "agreement")
        module.log_mean(f"{stage}/margin", pairs.lead, pairs.decided, batch_size=1)
        module.log_mean(f"{stage}/agreement_length_baseline", longer_is_better, pairs.decided, batch_size=1)


def agreement_name(gap: float) -> str:
    """How the agreement on pairs further apart than a gap is called."""
    return f"agreement_gap_{gap:g}".replace(".", "_") if gap else "agreement"
