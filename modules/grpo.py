"""Policy gradients without a value model: G responses to each prompt are held against each other.

    python train.py fit --config configs/grpo.yaml

GRPO, Dr. GRPO, DAPO, GSPO, RLOO, REINFORCE++: see `compositions.py` for which is which. The defaults are GRPO's (Shao
et al. 2024, https://arxiv.org/abs/2402.03300), with one difference: the reward model's normaliser stands before the
group's.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..functional import has_spread
from .checks import require
from .compositions import Advantage, Aggregation, GroupNormalized, Objective, SequenceMean, TokenRatio
from .policy_gradient import PolicyGradientModule
from .rollout_module import Reward
from .samples import Samples, chosen, joined, of_ranks


class GroupExperience(NamedTuple):
    """An `Experience` with what the loss reads, (B, T) each."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    logprobs: Tensor
    """log π_old(token t | all before it)."""
    ref_logprobs: Tensor
    advantages: Tensor


class GRPOModule(PolicyGradientModule):
    """Group-relative policy optimisation and its relatives, by composition.

    loss = aggregation over tokens of [ objective(ρ_t, A_t) + kl_coef · KL_t − entropy_coef · H_t ]

    One epoch of the Trainer is one iteration: `rollout_batch_size` responses per process, `group_size` to a prompt,
    `num_passes` shuffled passes over them in minibatches of `minibatch_size`. An optimizer step is of whole groups, if
    G divides its number of responses.

    Args:
        model: the starting policy; see `OnPolicyModule`.
        reward: what to maximise; see `RolloutModule`.
        group_size: G, responses per prompt. Usual: 4 to 64.
        kl_coef: β, price of one nat of KL to the reference. Usual: 0 to 0.1.
        kl_in: `loss` adds β · KL per token to the loss (GRPO), which charges no token for the KL of later ones;
            `reward` subtracts it from the rewards (RLOO, REINFORCE++, PPO), which does.
        kl_estimator: k3 in GRPO; in the loss its gradient is that of KL(reference ‖ policy), while k2's is that of
            KL(policy ‖ reference); k1 belongs in the reward.
        advantage: GroupNormalized, GroupCentered, LeaveOneOut, WhitenedReturns, WhitenedGroupScores, or your own
            `Advantage`; None is GroupNormalized.
        objective: TokenRatio or SequenceRatio with their clip ranges, or your own `Objective`; None is TokenRatio.
        aggregation: SequenceMean, TokenMean, FixedLengthMean, or your own `Aggregation`; None is SequenceMean.
        max_sampling_rounds: dynamic sampling (DAPO): sample so many times at most, until there are enough groups whose
            rewards differ; 1 is off.
        **kwargs: see `PolicyGradientModule`, `OnPolicyModule` and `TextModule`.
    """

    experience_type = GroupExperience
    shuffles_groups = True  # their advantages add up to 0, and their prompt is read once

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward: Reward | None = None,
        *,
        group_size: int = 8,
        kl_coef: float = 0.04,
        kl_in: Literal["loss", "reward"] = "loss",
        kl_estimator: Literal["k1", "k2", "k3"] = "k3",
        advantage: Advantage | None = None,
        objective: Objective | None = None,
        aggregation: Aggregation | None = None,
        max_sampling_rounds: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, reward, group_size=group_size, kl_coef=kl_coef, kl_estimator=kl_estimator, **kwargs)
        self.advantage = advantage or GroupNormalized()
        self.objective, self.aggregation = objective or TokenRatio(), aggregation or SequenceMean()
        require("kl_in", kl_in in ("loss", "reward"), "loss or reward", kl_in)
        smallest = 2 if self.advantage.needs_groups or max_sampling_rounds > 1 else 1
        require("group_size", group_size >= smallest, f"at least {smallest}, to compare responses", group_size)
        require("max_sampling_rounds", max_sampling_rounds >= 1, "at least 1", max_sampling_rounds)
        if kl_in == "loss" and kl_estimator == "k1" and kl_coef:
            raise ValueError("`kl_estimator` k1 has no gradient in the loss on average: use k2, k3, or `kl_in` reward.")

    def on_train_epoch_start(self) -> None:
        """One iteration's experience; the epoch's training steps are the update."""
        hparams = self.hparams
        with self.rollout_phase():
            samples = self.sample_groups()  # 1. sample G responses per prompt, 2. score them
            rollout, mask = samples.rollout, samples.rollout.response_mask
            stats = self.token_statistics(rollout)
            kl_coef = self.kl_coef if hparams.kl_in == "reward" else 0.0
            rewards = self.token_rewards(samples, stats, kl_coef)  # 3. shape
            advantages = self.advantage(rewards, mask, hparams.group_size, self.sum_over_ranks)  # 4. compare
        experience = GroupExperience(*rollout[:4], stats.logprobs, stats.ref_logprobs, advantages)
        self.fill(experience)  # 5. update: training_step
        self.observe(samples, stats, advantage=advantages)
        self.control_kl(stats, mask)

    def training_step(self, batch: GroupExperience, batch_idx: int) -> Tensor:
        """The composed loss of a minibatch."""
        hparams, mask = self.hparams, batch.response_mask
        said = self.read(self.policy, batch, with_entropy=self.entropy_coef > 0)
        logprobs = said.logprobs
        policy_loss = loss = self.objective.loss(logprobs, batch.logprobs, batch.advantages, mask)  # (B, T)
        if hparams.kl_in == "loss" and self.kl_coef:
            loss = loss + self.kl_coef * self.kl(logprobs, batch.ref_logprobs)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * said.entropy
        clipped = self.objective.is_clipped(logprobs, batch.logprobs, mask)
        self.log_update(batch, batch_idx, logprobs, policy_loss, clipped)
        return self.mean_loss(*self.aggregation(loss, mask))

    def sample_groups(self) -> Samples:
        """An iteration's responses; with dynamic sampling, those to prompts whose responses' rewards differ.

        Then all ranks sample until there are enough such groups on all of them together, and share the first of them
        out. If there are not enough in `max_sampling_rounds`, groups without spread fill up.
        """
        size = self.hparams.group_size
        if self.hparams.max_sampling_rounds == 1:
            samples = self.sample_and_score()
            if size > 1:
                self._log_spread(has_spread(samples.scores.total, size))
            return samples
        groups = self.hparams.rollout_batch_size // size
        rounds: list[Samples] = []
        for again in range(self.hparams.max_sampling_rounds):
            rounds.append(of_ranks(self.sample_and_score(again)))
            pool = joined(rounds)
            spread = has_spread(pool.scores.total, size)
            if spread.sum() >= groups * self.trainer.world_size:
                break
        self._log_spread(spread)
        self.log_mean("rollout/sampling_rounds", torch.tensor([len(rounds)], device=self.device), batch_size=1)
        order = (~spread).int().argsort(stable=True)  # those with spread first, else as they were sampled
        mine = order[self.global_rank * groups :][:groups].tolist()
        return chosen(pool, [group * size + i for group in mine for i in range(size)])

    def _log_spread(self, spread: Tensor) -> None:
        self.log_mean("rollout/groups_with_spread", spread.float(), batch_size=1)
