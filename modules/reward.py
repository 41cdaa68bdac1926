"""Reward models: what people like, as one number per text.

    python train.py fit --model RewardModule --model.model HuggingFaceTB/SmolLM2-135M-Instruct \
        --data PreferenceDataModule --data.data my_comparisons.jsonl

How it departs from InstructGPT (https://arxiv.org/abs/2203.02155):
1. Besides chosen/rejected pairs it learns from ratings: one forward per text, then every pair of the batch is compared,
   with the share of raters who preferred one as a soft label.
2. Scores are normalised on held-out reference text to mean 0 and standard deviation 1 (InstructGPT: mean 0).
"""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import PearsonCorrCoef, SpearmanCorrCoef
from transformers import PreTrainedModel

from ..functional import mean_rating, preference_matrix, soft_bradley_terry_loss
from .backbone import Scorer
from .metrics import Moments, PairAgreement, SoftCalibrationError
from .text_module import TextModule


class Comparisons(NamedTuple):
    """Pairs of texts (i, j) to learn from; each field has shape (N,)."""

    difference: Tensor
    """Score of i minus score of j."""
    preference: Tensor
    """Share of people who prefer i, in [0, 1]."""
    margin: Tensor
    """By how much i should win."""


class RewardModule(TextModule):
    """A language model with a scalar head, trained on comparisons (Bradley-Terry).

    loss = − p log σ(r_i − r_j − margin) − (1 − p) log σ(−(r_i − r_j − margin)), a mean over pairs,

    with r read at the last real token. From a `PreferenceDataModule`, i is the chosen text and p = 1. From a
    `RatingDataModule`, i < j run over all texts of the batch and p is the share of (rater of i, rater of j) pairs in
    which i was rated higher.

    At the end of every validation the normaliser is fitted: scores of the validation texts then have mean 0 and
    standard deviation 1. It is saved with the model. Without validation data scores stay raw.

    Args:
        model: a hub id, a local folder, `package:NAME`, or a `PreTrainedModel` with a `score` head.
        gaps: agreement is also reported for pairs whose ratings (or margins) differ by more than each of these.
        **kwargs: see `TextModule`.
    """

    def __init__(self, model: str | PreTrainedModel, *, gaps: tuple[float, ...] = (1.0, 2.0), **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.network: Scorer | None = None
        self.reference_moments = Moments()
        self.calibration = SoftCalibrationError()
        with warnings.catch_warnings():  # that ranks need all values in memory: one number per held-out text
            warnings.simplefilter("ignore")
            self.correlations = nn.ModuleDict({"pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef()})
        self.agreements = nn.ModuleDict({_agreement_name(g): PairAgreement(g) for g in (0.0, *gaps)})

    def load_network(self) -> Scorer:
        """The backbone and its head, with adapters if `lora_r` says so."""
        scorer = Scorer.load(self._model_spec, self.backbone_dtype, self.hparams.trust_remote_code)
        return Scorer(self.prepare_backbone(scorer.model))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Normalised scores (B,) of tokenised texts."""
        return self.network(batch["input_ids"], batch["attention_mask"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Summed loss over the pairs of the batch."""
        pairs = compare(self.network.raw(batch["input_ids"], batch["attention_mask"]), batch)
        losses = soft_bradley_terry_loss(*pairs)
        self.log_mean("train/agreement", _agrees(pairs), pairs.preference != 0.5, batch_size=1)
        return self.mean_loss(losses.sum(), losses.numel())

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Agreement by gap, correlation, calibration."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Agreement by gap, correlation, calibration."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        raw = self.network.raw(batch["input_ids"], batch["attention_mask"])
        pairs = compare(raw, batch)
        if stage == "val":
            self.reference_moments.update(raw)
        self.log_mean(f"{stage}/loss", soft_bradley_terry_loss(*pairs), batch_size=1)
        self.calibration.update(pairs.difference.sigmoid(), pairs.preference)
        self.log(f"{stage}/calibration_error", self.calibration, on_epoch=True, batch_size=1)
        if "ratings" not in batch:
            for name, agreement in self.agreements.items():
                gap = pairs.margin > agreement.min_gap if agreement.min_gap else torch.ones_like(pairs.margin).bool()
                self.log_mean(f"{stage}/{name}", _agrees(pairs), gap, batch_size=1)
            return
        rating = mean_rating(batch["ratings"], batch["ratings_mask"])
        for name, metric in [*self.agreements.items(), *self.correlations.items()]:
            metric.update(raw, rating)
            self.log(f"{stage}/{name}", metric, on_epoch=True, batch_size=1, prog_bar=name == "agreement")

    def on_validation_epoch_end(self) -> None:
        """Fit the normaliser on the validation texts."""
        mean, std = (float(x) for x in self.reference_moments.compute())
        self.reference_moments.reset()
        self.network.set_normalizer(mean, std if std > 0 else 1.0)
        self.log_dict({"val/raw_mean": mean, "val/raw_std": std}, sync_dist=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list]:
        """Texts and their scores."""
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        decoded = [
            self.tokenizer.decode(row[kept], skip_special_tokens=True) for row, kept in zip(ids, mask, strict=True)
        ]
        return {"text": decoded, "score": self(batch).tolist()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The normaliser goes along."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["normalizer"] = [self.network.mean, self.network.std]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The normaliser comes back."""
        super().on_load_checkpoint(checkpoint)
        self.network.set_normalizer(*checkpoint["normalizer"])


def compare(raw: Tensor, batch: dict[str, Tensor]) -> Comparisons:
    """The pairs of a batch: given ones, or with ratings every text against every other."""
    if "ratings" in batch:
        i, j = torch.triu_indices(len(raw), len(raw), offset=1, device=raw.device)
        preference = preference_matrix(batch["ratings"], batch["ratings_mask"])[i, j]
        return Comparisons(raw[i] - raw[j], preference, torch.zeros_like(preference))
    chosen, rejected = raw.chunk(2)
    return Comparisons(chosen - rejected, torch.ones_like(chosen), batch["margin"])


def _agrees(pairs: Comparisons) -> Tensor:
    """1 where the scores prefer the text that people prefer, 1/2 at equal scores, else 0."""
    return (1 + pairs.difference.sign() * (pairs.preference - 0.5).sign()) / 2


def _agreement_name(gap: float) -> str:
    return f"agreement_gap_{gap:g}".replace(".", "_") if gap else "agreement"
