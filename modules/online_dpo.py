"""Online preference optimisation: the policy's own samples are paired by their rewards, and learned from like pairs.

python train.py fit --config configs/online_dpo.yaml
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..functional import grouped, has_spread, masked_sum, soft_preference_loss
from .checks import require
from .objectives import DPO, Likelihoods, PairObjective
from .on_policy import OnPolicyModule
from .preference import figures
from .rollout_module import Reward
from .samples import chosen


class PairExperience(NamedTuple):
    """An `Experience` of pairs: row 2i is the better response of pair i, row 2i + 1 the worse one."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    ref_logprobs: Tensor
    """(B, T)."""
    preference: Tensor
    """(B,), share of judges who prefer the better response, the same for both rows of a pair."""


class OnlineDPOModule(OnPolicyModule):
    """DPO, or another pair objective, on pairs that the policy samples and a reward orders.

    Of G responses to a prompt, the one with the highest and the one with the lowest score make a pair. With a
    `label_temperature` τ the label is the share of Bradley-Terry judges, σ((R_w − R_l) / τ), and DPO's limit is the
    optimum of KL-regularised RL, π_ref · exp(R / (τβ)); τ = 0 is certain of the better one, however small the
    difference, and of two that score the same it says nothing (½).

    Source: Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback",
    https://arxiv.org/abs/2402.04792.

    Args:
        model: the starting policy; see `OnPolicyModule`.
        reward: what orders the responses; see `RolloutModule`.
        objective: DPO, IPO, Hinge, SimPO, CPO or ORPO, with their own arguments; None is DPO with β = 0.1.
        group_size: G, responses per prompt. Usual: 2 to 8.
        label_temperature: τ, in units of reward.
        **kwargs: see `OnPolicyModule`, `RolloutModule` and `TextModule`; an iteration learns from 2 ·
            `rollout_batch_size` / `group_size` sequences, of which `minibatch_size` make a minibatch.
    """

    experience_type = PairExperience
    rows_together = 2
    learned_from = "2 * rollout_batch_size / group_size"

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward: Reward | None = None,
        *,
        objective: PairObjective | None = None,
        group_size: int = 2,
        label_temperature: float = 0.0,
        **kwargs: Any,
    ) -> None:
        require("group_size", group_size >= 2, "at least 2, to make pairs", group_size)
        require("label_temperature", label_temperature >= 0, "at least 0", label_temperature)
        super().__init__(model, reward, group_size=group_size, **kwargs)
        self.objective = objective or DPO()

    @property
    def learned_rows(self) -> int:
        """A pair per prompt."""
        return 2 * self.hparams.rollout_batch_size // self.hparams.group_size

    def on_train_epoch_start(self) -> None:
        """One iteration's pairs; the epoch's training steps learn from them."""
        with self.rollout_phase():
            samples = self.sample_and_score()
            stats = self.token_statistics(samples.rollout)
            scores = self.shaped_scores(samples.scores.total, samples.rollout)
            rows = self.pairs(scores)
            preference = self.preference(scores[rows])
        rollout, ref_logprobs = chosen(samples.rollout, rows), stats.ref_logprobs[rows]
        self.fill(PairExperience(*rollout[:4], ref_logprobs, preference))
        self.observe(samples, stats)
        difference = scores[rows[0::2]] - scores[rows[1::2]]
        self.log_mean("rollout/pair_gap", difference, batch_size=1)
        self.log_mean("rollout/tied_pairs", (difference == 0).float(), batch_size=1)
        spread = has_spread(samples.scores.total, self.hparams.group_size)
        self.log_mean("rollout/groups_with_spread", spread.float(), batch_size=1)

    def pairs(self, scores: Tensor) -> list[int]:
        """Rows of the best and the worst response to each prompt, in turn; of equal ones the first and the last."""
        groups = grouped(scores, self.hparams.group_size)
        size = groups.shape[1]
        worst = size - 1 - groups.flip(1).argmin(dim=1)
        within = torch.stack([groups.argmax(dim=1), worst], dim=1)  # (groups, 2)
        return (within + size * torch.arange(len(groups), device=scores.device)[:, None]).flatten().tolist()

    def preference(self, scores: Tensor) -> Tensor:
        """(2N,) share of judges who prefer the better response, from the scores (2N,) of N pairs."""
        difference = scores[0::2] - scores[1::2]  # at least 0
        temperature = self.hparams.label_temperature
        share = (difference / temperature).sigmoid() if temperature else (1 + difference.sign()) / 2
        return share.repeat_interleave(2)

    def training_step(self, batch: PairExperience, batch_idx: int) -> Tensor:
        """Summed loss over the pairs of a minibatch."""
        mask = batch.response_mask
        columns = (self.read(self.policy, batch).logprobs, batch.ref_logprobs)
        rows = [*(masked_sum(column, mask, dim=1) for column in columns), mask.sum(1)]
        better, worse = (Likelihoods(*(column[start::2] for column in rows)) for start in (0, 1))
        losses = self.objective.loss(better, worse), self.objective.loss(worse, better)
        for name, values in figures(self.objective, better, worse).items():
            self.log_mean(f"train/{name}", values, batch_size=len(values))
        loss = soft_preference_loss(*losses, batch.preference[0::2])
        return self.mean_loss(loss.sum(), len(loss))
