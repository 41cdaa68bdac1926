"""Preference optimisation without a reward model: DPO and its relatives, from pairs of completions.

    python train.py fit --model PreferenceModule --model.model runs/sft/model --data PreferenceDataModule \
        --data.data my_comparisons.jsonl
    ... --model.objective SimPO --model.objective.gamma 1.2
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..functional import entropy, exact_kl, smoothed_preference, soft_preference_loss, unbiased_preference
from .checks import require
from .completions import CompletionModule, Completions, completion_logits, completion_logprobs, completions_of
from .metrics import SourceAgreement
from .objectives import DPO, Likelihoods, PairObjective


class PreferenceModule(CompletionModule):
    """Trains a language model to prefer, of two completions, the one that people chose.

    loss = p · l(chosen, rejected) + (1 − p) · l(rejected, chosen), a mean over pairs,

    with l as the objective says and p the share of people who prefer the chosen completion: the data's `preference`, 1
    where it says nothing. A noise rate ε changes the label and not the loss: p(1 − ε) + (1 − p)ε, or, if `robust`,
    (p − ε) / (1 − 2ε). Batches come from `PreferenceDataModule`, whose `margin` is not used here.

    Logged, for `train`, `val` and `test`, as means over pairs: `reward_chosen`, `reward_rejected` (what the objective's
    `score` says), `margin`, their difference, `accuracy`, how often it is above 0 (ties ½), `logprob_chosen` and
    `logprob_rejected`. For `val` and `test`, as means over the tokens of all completions, `entropy` of the policy and,
    with a reference in memory, `kl_per_token`; `accuracy/<source>` where the data name sources.

    Args:
        model: the starting policy, usually the SFT model's folder.
        objective: DPO, IPO, Hinge, SimPO, CPO or ORPO, with their own arguments; None is DPO with β = 0.1.
        label_smoothing: ε, share of the pairs whose label is thought to be wrong: 0 to 0.3.
        robust: correct the loss for the wrong labels, without bias, instead of being less certain of all of them.
        **kwargs: see `CompletionModule` and `TextModule`.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        objective: PairObjective | None = None,
        label_smoothing: float = 0.0,
        robust: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        require("label_smoothing", 0 <= label_smoothing < 0.5, "at least 0 and below 0.5", label_smoothing)
        require("robust", label_smoothing > 0 or not robust, "False where `label_smoothing` is 0", robust)
        self.objective = DPO() if objective is None else objective
        self.uses_reference = self.objective.uses_reference
        self.by_source = SourceAgreement()
        for name in ("reference", "reference_cache"):
            none = f"None with {type(self.objective).__name__}, which uses no reference"
            require(name, self.uses_reference or self.hparams[name] is None, none, self.hparams[name])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Summed loss over the pairs of the batch."""
        check_pairs(batch)
        policy = completion_logprobs(self.policy, batch)
        losses = self._losses(policy, self.reference_logprobs(batch), batch, "train")
        return self.mean_loss(losses.sum(), len(losses))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss, rewards, and how far the policy is from the reference."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss, rewards, and how far the policy is from the reference."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Accuracy by source."""
        self.by_source.log(self, "val/accuracy")

    def on_test_epoch_end(self) -> None:
        """Accuracy by source."""
        self.by_source.log(self, "test/accuracy")

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        check_pairs(batch)
        logits = completion_logits(self.policy, batch)
        self.log_mean(f"{stage}/entropy", entropy(logits), batch_size=1)
        if self.reference is None:
            ref_logprobs = self.reference_logprobs(batch)
        else:
            with self.reference() as network:
                ref_logits = completion_logits(network, batch)
            ref_logprobs = completions_of(ref_logits, batch).logprobs
            self.log_mean(f"{stage}/kl_per_token", exact_kl(logits, ref_logits), batch_size=1)
        losses = self._losses(completions_of(logits, batch), ref_logprobs, batch, stage)
        self.log_mean(f"{stage}/loss", losses, batch_size=1, prog_bar=True)

    def _losses(self, policy: Completions, ref_logprobs: Tensor, batch: dict[str, Any], stage: str) -> Tensor:
        """(B,) losses of the pairs; logs what is seen of them."""
        chosen, rejected = pair(policy, ref_logprobs)
        seen = figures(self.objective, chosen, rejected)
        for name, values in seen.items():
            self.log_mean(f"{stage}/{name}", values, batch_size=1, prog_bar=name == "accuracy")
        if "source" in batch and stage != "train":
            self.by_source.update_pairs(batch["source"], seen["accuracy"], torch.ones_like(seen["accuracy"]))
        losses = self.objective.loss(chosen, rejected), self.objective.loss(rejected, chosen)
        return soft_preference_loss(*losses, self.labels(batch))

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) share of people who prefer the chosen completions, after what is known of the noise."""
        preference = batch.get("preference", torch.ones_like(batch["margin"]))
        change = unbiased_preference if self.hparams.robust else smoothed_preference
        return change(preference, self.hparams.label_smoothing)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list]:
        """The completions of the pairs and their implicit rewards."""
        check_pairs(batch)
        pairs = pair(completion_logprobs(self.policy, batch), self.reference_logprobs(batch))
        ids, mask = batch["input_ids"], batch["loss_mask"]
        decode = self.tokenizer.decode
        texts = [decode(row[kept], skip_special_tokens=True) for row, kept in zip(ids, mask, strict=True)]
        rewards = [self.objective.score(completions).tolist() for completions in pairs]
        half = len(texts) // 2
        found = {"chosen": texts[:half], "rejected": texts[half:]}
        return found | {"reward_chosen": rewards[0], "reward_rejected": rewards[1]}


def pair(policy: Completions, ref_logprobs: Tensor) -> tuple[Likelihoods, Likelihoods]:
    """Chosen and rejected, from the 2B completions of a batch."""
    halves = zip(*(values.chunk(2) for values in (policy.logprobs, ref_logprobs, policy.lengths)), strict=True)
    chosen, rejected = (Likelihoods(*fields) for fields in halves)
    return chosen, rejected


def figures(objective: PairObjective, chosen: Likelihoods, rejected: Likelihoods) -> dict[str, Tensor]:
    """What there is to see of B pairs, by name; all (B,)."""
    rewards = objective.score(chosen), objective.score(rejected)
    margin = rewards[0] - rewards[1]
    return {
        "reward_chosen": rewards[0],
        "reward_rejected": rewards[1],
        "margin": margin,
        "accuracy": (1 + margin.sign()) / 2,
        "logprob_chosen": chosen.logprobs,
        "logprob_rejected": rejected.logprobs,
    }


def check_pairs(batch: dict[str, Any]) -> None:
    """ValueError for batches that are no pairs."""
    rows = len(batch["input_ids"])
    if "label" in batch or "margin" not in batch or "loss_mask" not in batch or rows != 2 * len(batch["margin"]):
        raise ValueError(
            "`--data` must be a `PreferenceDataModule`: PreferenceModule learns from batches of chosen completions and "
            f"then as many rejected ones, with `loss_mask` and `margin`, but got {rows} rows with {sorted(batch)}."
        )
