"""KTO: learning from single completions that people called good or bad (a thumb up or down), without pairs.

    python train.py fit --model KTOModule --model.model runs/sft/model \
        --data UnpairedDataModule --data.data my_thumbs.csv

Three choices of this file (the paper: https://arxiv.org/abs/2402.01306):
1. The reference point z is measured on the prompts of the batch, each with the completion of another row of it, and
   takes no gradient, as in the paper. The batch is that of all ranks; the paper's code looks for the other row on the
   same rank.
2. The policy reads a batch in two passes: the examples with gradient, the mismatched completions without, since their
   activations would be as large and serve nothing. The reference reads both in one.
3. z is measured anew with every batch. Gradient accumulation therefore changes it, see `KTOModule`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..functional import entropy, exact_kl, kto_loss, kto_reference_point
from .checks import require
from .completions import CompletionModule, completion_logits, completion_logprobs, completions_of
from .metrics import MeanDifference


class Examples(NamedTuple):
    """What policy and reference say of the B examples of a batch."""

    logprobs: Tensor
    """(B,) log π(completion | prompt)."""
    log_ratio: Tensor
    """(B,) the same less log π_ref."""
    kl: Tensor
    """z of the batches of all ranks, a scalar without gradient."""


class KTOModule(CompletionModule):
    """Kahneman-Tversky optimisation: good completions up, bad ones down, each measured against the policy's own drift.

    loss = w_D (1 − σ(β (u − z))) of a desirable completion, w_U (1 − σ(β (z − u))) of an undesirable one; a mean over
    all of them, with u = log π / π_ref and z = max(0, mean of u over mismatched completions).

    Batches come from `UnpairedDataModule`. Padding and the number of ranks change no update. What does: z is the mean
    over *one* batch, as in the paper, so `accumulate_grad_batches: 2` makes two reference points of half as many
    completions each, which are paired otherwise. Give as large a `batch_size` as fits; the paper asks for 2 at least.

    Logged, for `train`, `val` and `test`: `kl`, z as a mean over batches; `reward_desirable` and `reward_undesirable`,
    means of β u; `logprob_desirable` and `logprob_undesirable`, means of log π; `accuracy`, how often u is on the right
    side of z (ties ½). For `val` and `test`, too: `margin`, the first mean reward less the second; `entropy` of the
    policy and `kl_per_token` of policy and reference, means over the tokens of the completions. All but what has to do
    with z is exact over batches.

    Args:
        model: the starting policy, usually the SFT model's folder.
        beta: β, how soon a completion is good (or bad) enough. Usual: 0.1; less for a reference that was fine-tuned on
            the same data, up to 0.5 for one that is aligned already.
        desirable_weight: w_D. With n_D good and n_U bad completions, w_D n_D / (w_U n_U) should be 1 to 1.5.
        undesirable_weight: w_U.
        **kwargs: see `CompletionModule`.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        require("beta", beta > 0, "above 0", beta)
        require("desirable_weight", desirable_weight >= 0, "at least 0", desirable_weight)
        require("undesirable_weight", undesirable_weight >= 0, "at least 0", undesirable_weight)
        cache = self.hparams.reference_cache
        require("reference_cache", cache is None, "None: the completions are mismatched anew in every epoch", cache)
        self.margin = MeanDifference()

    def forward(self, batch: dict[str, Tensor]) -> Examples:
        """Log-probabilities and log-ratios of the examples, and how far the policy has moved."""
        texts, examples, mismatched = halves(batch)
        logprobs = completion_logprobs(self.policy, examples).logprobs
        with torch.no_grad():  # second: autocast keeps the weights that it cast for the first
            other_logprobs = completion_logprobs(self.policy, mismatched).logprobs
        ref_logprobs, other_ref_logprobs = self.reference_logprobs(texts).chunk(2)
        kl = self._reference_point(other_logprobs - other_ref_logprobs, mismatched)
        return Examples(logprobs, logprobs - ref_logprobs, kl)

    def _reference_point(self, log_ratio: Tensor, mismatched: dict[str, Tensor]) -> Tensor:
        counts = mismatched["loss_mask"].any(1)  # a row that was alone has no mismatch
        return kto_reference_point(log_ratio, counts, self.sum_over_ranks)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Summed loss of the examples."""
        losses = self._losses(self(batch), batch, "train")
        return self.mean_loss(losses.sum(), len(losses))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss, rewards and the reference point on held-out completions."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss, rewards and the reference point on test completions."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        found = self._with_distributions(batch, stage)
        losses = self._losses(found, batch, stage)
        self.log_mean(f"{stage}/loss", losses, prog_bar=True, batch_size=1)
        self.margin.update(self.hparams.beta * found.log_ratio, batch["label"])
        self.log(f"{stage}/margin", self.margin, on_epoch=True, batch_size=1)

    def _with_distributions(self, batch: dict[str, Tensor], stage: str) -> Examples:
        """The same as `forward` in as many passes; logs entropy and KL over the whole vocabulary on the way."""
        _, examples, mismatched = halves(batch)
        logits = completion_logits(self.policy, examples)
        other_logprobs = completion_logprobs(self.policy, mismatched).logprobs
        with self.reference() as network:
            ref_logits = completion_logits(network, examples)
            other_ref_logprobs = completion_logprobs(network, mismatched).logprobs
        self.log_mean(f"{stage}/entropy", entropy(logits), batch_size=1)
        self.log_mean(f"{stage}/kl_per_token", exact_kl(logits, ref_logits), batch_size=1)
        logprobs, ref_logprobs = (completions_of(of, examples).logprobs for of in (logits, ref_logits))
        kl = self._reference_point(other_logprobs - other_ref_logprobs, mismatched)
        return Examples(logprobs, logprobs - ref_logprobs, kl)

    def _losses(self, found: Examples, batch: dict[str, Tensor], stage: str) -> Tensor:
        """(B,) losses; what else there is to see is logged."""
        hparams, label = self.hparams, batch["label"]
        right = torch.where(label, 1, -1) * (found.log_ratio - found.kl).sign()
        self.log_mean(f"{stage}/accuracy", (1 + right) / 2, batch_size=1)
        self.log_mean(f"{stage}/kl", found.kl, batch_size=1)
        for kind, mask in {"desirable": label, "undesirable": ~label}.items():
            self.log_mean(f"{stage}/reward_{kind}", hparams.beta * found.log_ratio, mask, batch_size=1)
            self.log_mean(f"{stage}/logprob_{kind}", found.logprobs, mask, batch_size=1)
        weights = hparams.desirable_weight, hparams.undesirable_weight
        return kto_loss(found.log_ratio, label, found.kl, hparams.beta, *weights)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list]:
        """The completions, their labels, and their implicit rewards β u."""
        found, label = self(batch), batch["label"]
        examples = zip(batch["input_ids"], batch["loss_mask"][: len(label)], strict=False)
        texts = [self.tokenizer.decode(row[kept], skip_special_tokens=True) for row, kept in examples]
        rewards = self.hparams.beta * found.log_ratio
        return {"completion": texts, "label": label.tolist(), "reward": rewards.tolist()}


def halves(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The 2B texts of a batch: all of them, the B examples, and the B mismatched ones.

    Raises:
        ValueError: if the batch has no labels.
    """
    if "label" not in batch:
        raise ValueError(
            f"KTOModule needs batches with a `label` per completion, but this one has {sorted(batch)}: give "
            "`--data UnpairedDataModule`, which also takes data with columns chosen and rejected."
        )
    texts = {name: batch[name] for name in ("input_ids", "attention_mask", "loss_mask")}
    return texts, *({name: x.chunk(2)[half] for name, x in texts.items()} for half in (0, 1))
