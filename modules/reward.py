"""Reward models: what people like, as one number per text.

    python train.py fit --model RewardModule --model.model HuggingFaceTB/SmolLM2-135M-Instruct \
        --data PreferenceDataModule --data.data my_comparisons.jsonl

How it departs from InstructGPT (https://arxiv.org/abs/2203.02155):
1. Besides chosen/rejected pairs it learns from ratings: one forward per text, then every pair of the batch is compared,
   with the share of raters who preferred one as a soft label.
2. A ranked list is one observation (Plackett-Luce) instead of all its pairs.
3. Scores are normalised on held-out reference text to mean 0 and standard deviation 1 (InstructGPT: mean 0).

`reward_objectives.py` holds what may be learned, `reward_evaluation.py` what is reported of held-out texts.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .backbone import unwrapped
from .metrics import Moments
from .reward_evaluation import RewardEvaluation
from .reward_objectives import Preferences, RewardObjective
from .scorer import Scorer
from .text_module import TextModule


class RewardModule(TextModule):
    """A language model with a scalar head, trained on what people prefer.

    Without an `objective` it learns from comparisons (Bradley-Terry):

    loss = − p log σ(r_i − r_j − margin) − (1 − p) log σ(−(r_i − r_j − margin)), a mean over pairs,

    with r read at the last real token. From a `PreferenceDataModule`, i is the chosen text and p = 1, or the share of
    people who chose it. From a `RatingDataModule`, i < j run over all texts of the batch and p is the share of
    (rater of i, rater of j) pairs in which i was rated higher. The lists of a `RankingDataModule` are learned whole:

    loss = −Σ_k log( exp r_(k) / Σ_{j ≥ k} exp r_(j) ) from the best to the worst, a mean over lists (Plackett-Luce).

    At the end of every validation the normaliser is fitted: scores of the validation texts then have mean 0 and
    standard deviation 1. It is saved with the model. Without validation data scores stay raw.

    Args:
        model: a hub id, a local folder, `package:NAME`, or a `PreTrainedModel` with a `score` head.
        objective: another loss, such as `OrdinalRatings` or `RatingRegression`; None is the above.
        gaps: agreement is also reported for pairs whose ratings, margins or ranks differ by more than each of these.
        **kwargs: see `TextModule`.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        objective: RewardObjective | None = None,
        gaps: tuple[float, ...] = (1.0, 2.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.network: Scorer | None = None
        self.objective = Preferences() if objective is None else objective
        self.evaluation = RewardEvaluation(gaps)
        self.reference_moments = Moments()

    def load_network(self) -> Scorer:
        """The backbone and its head, with adapters if `lora_r` says so."""
        hparams = self.hparams
        scorer = Scorer.load(self._model_spec, self.backbone_dtype, hparams.trust_remote_code, hparams.load_in_4bit)
        return Scorer(self.prepare_backbone(scorer.model))

    def build(self) -> list[nn.Module]:
        """Load the network; the objective goes on from what the model's own training left."""
        networks = super().build()
        self.objective.start_from(getattr(self.config, "reward_objective", {}))
        return [*networks, self.objective] if [*self.objective.parameters()] else networks

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Two groups if the objective has parameters: they have a learning rate of their own, and do not decay."""
        own = list(self.objective.parameters())
        if not own:
            return super().parameter_groups()
        rate = self.hparams.learning_rate if self.objective.learning_rate is None else self.objective.learning_rate
        return [
            {"params": [p for p in self.network.parameters() if p.requires_grad], "name": "network"},
            {"params": own, "name": "objective", "lr": rate, "weight_decay": 0.0},
        ]

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Normalised scores (N,) of tokenised texts."""
        return self.network(batch["input_ids"], batch["attention_mask"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Summed loss over the pairs, lists or texts of the batch."""
        raw = self.network.raw(batch["input_ids"], batch["attention_mask"])
        judged = self.objective(raw, batch)
        self.log_mean("train/agreement", judged.pairs.agreement, judged.pairs.decided, batch_size=1)
        self.log_mean("train/margin", judged.pairs.lead, judged.pairs.decided, batch_size=1)
        self.log_mean("train/raw_mean", raw, batch_size=1)
        self.log_range("train/raw", raw, batch_size=1)
        return self.mean_loss(judged.losses.sum(), judged.losses.numel())

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Agreement with people, and what the normaliser is fitted on."""
        self.reference_moments.update(self._evaluate(batch, "val"))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Agreement with people."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Any], stage: str) -> Tensor:
        raw = self.network.raw(batch["input_ids"], batch["attention_mask"])
        self.evaluation.log(self, stage, raw, self.objective(raw, batch), batch)
        return raw

    def on_validation_epoch_end(self) -> None:
        """Fit the normaliser on the validation texts; agreement by source."""
        self.evaluation.by_source.log(self, "val/agreement")
        mean, std = (float(x) for x in self.reference_moments.compute())
        self.reference_moments.reset()
        self.network.set_normalizer(mean, std if std > 0 else 1.0)
        self.log_dict({"val/raw_mean": mean, "val/raw_std": std}, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Agreement by source."""
        self.evaluation.by_source.log(self, "test/agreement")

    @property
    def reliability(self) -> dict[str, Tensor]:
        """What the last evaluation says of calibration: for `pairs`, and of ordinal models for `levels`, a table of
        count, mean probability and mean label per bin of probabilities; see `CalibrationError`."""
        return self.evaluation.reliability

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list]:
        """Texts and their scores."""
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        decoded = [
            self.tokenizer.decode(row[kept], skip_special_tokens=True) for row, kept in zip(ids, mask, strict=True)
        ]
        return {"text": decoded, "score": self(batch).tolist()}

    # --- checkpoints and export -----------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The network's config, which travels with the exported model."""
        return unwrapped(self.network.model).config

    def describe(self, objective: dict[str, Any]) -> None:
        """Let the config say what the network was trained by."""
        if objective:
            self.config.reward_objective = objective
        elif hasattr(self.config, "reward_objective"):
            del self.config.reward_objective

    def on_train_start(self) -> None:
        """What an earlier training left in the config is no longer true."""
        super().on_train_start()
        self.describe(self.objective.settings())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The normaliser goes along, and what the exported model says of the objective."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["normalizer"] = [self.network.mean, self.network.std]
        checkpoint["objective"] = self.objective.settings() or getattr(self.config, "reward_objective", {})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The normaliser comes back. Who only loads a module to score needs no objective."""
        strange = {k for k in checkpoint["state_dict"].keys() - self.state_dict().keys() if k.startswith("objective.")}
        if strange and self._trainer is not None:
            raise ValueError("`objective`: the checkpoint was trained with one that has parameters; give it as there.")
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in strange}
        super().on_load_checkpoint(checkpoint)
        self.take_over(checkpoint)

    def take_over(self, checkpoint: dict[str, Any]) -> None:
        """What a checkpoint says of the network beside its tensors."""
        self.network.set_normalizer(*checkpoint["normalizer"])
        self.describe(checkpoint.get("objective", {}))

    def save_pretrained(self, folder: str | Path, merge: bool = True) -> None:
        """Write a Hugging Face folder, the objective's settings in its config; see `TextModule`."""
        if settings := self.objective.settings():
            self.describe(settings)
        super().save_pretrained(folder, merge)
