"""Proximal policy optimisation with a value model, for language models.

    python train.py fit --config configs/demo/ppo.yaml

`on_train_epoch_start` and `training_step` are the algorithm. How it departs from Schulman et al. 2017
(https://arxiv.org/abs/1707.06347), as RLHF does since Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593):
1. An episode is one response; the action is a token; the score comes at the last token.
2. Every token is charged β times its KL to the reference policy.
3. The value loss is clipped too, and policy and value share one backbone (a separate value network is an option).
"""

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..functional import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    is_clipped,
    masked_sum,
    scale_to_unit_variance,
    whiten,
)
from .backbone import unwrapped
from .checks import require
from .experience import Experience
from .policy_gradient import PolicyGradientModule
from .rollout import Rollout
from .rollout_module import Reward, whole_sequences
from .scorer import Scorer
from .sharing import load_scorer, shared_base


class PPOExperience(NamedTuple):
    """An `Experience` with what PPO's losses read, (B, T) each."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    logprobs: Tensor
    """log π_old(token t | all before it)."""
    values: Tensor
    """V before token t."""
    advantages: Tensor
    returns: Tensor


class PPOModule(PolicyGradientModule):
    """PPO: clipped policy and value losses on KL-shaped rewards, generalised advantage estimation.

    loss = Σ_t [ −min(ρ_t A_t, clip(ρ_t, 1 ± ε) A_t) + vf_coef · L_value − entropy_coef · H_t ] / number of tokens,

    ρ_t = π(token t) / π_old(token t). One epoch of the Trainer is one iteration: `rollout_batch_size` responses per
    process, `num_passes` shuffled passes over them in minibatches of `minibatch_size`; the mean is over all response
    tokens of an optimizer step.

    Args:
        model: the starting policy; see `OnPolicyModule`.
        reward: what to maximise; see `RolloutModule`.
        kl_coef: β, price of one nat of KL to the starting policy. Usual: 0.01 to 0.2.
        value_model: folder or hub id of a reward model from which a separate value network starts; None puts a linear
            value head on the policy's last hidden state. Without LoRA it is trained whole, with LoRA its head and its
            adapters are: new ones, or those of a reward model's adapter folder, whatever `lora_r` is. If that belongs
            to the policy's base, the value network stands on that, too: see `sharing.py`.
        clip_range: ε of the policy ratio. Usual: 0.2.
        clip_range_value: how far values may move from the old ones before the loss is flat; None does not clip.
        vf_coef: weight of the value loss. Usual: 0.1 to 1.
        gamma: discount per token. Usual in RLHF: 1.
        gae_lambda: λ of generalised advantage estimation: 1 is Monte Carlo, 0 one-step TD. Usual: 0.95.
        whiten_rewards: scale KL-shaped rewards to standard deviation 1 over all ranks, mean kept.
        whiten_advantages: shift and scale advantages to mean 0, standard deviation 1 over all ranks.
        bootstrap_truncated: a response that hit the length limit goes on with the value after its last token instead
            of 0.
        value_learning_rate: of the value head or network; None is `learning_rate`.
        **kwargs: see `PolicyGradientModule`, `OnPolicyModule` and `TextModule`.
    """

    experience_type = PPOExperience
    has_values = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward: Reward | None = None,
        *,
        kl_coef: float = 0.05,
        value_model: str | None = None,
        clip_range: float = 0.2,
        clip_range_value: float | None = 0.2,
        vf_coef: float = 0.1,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        whiten_rewards: bool = False,
        whiten_advantages: bool = True,
        bootstrap_truncated: bool = False,
        value_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, reward, kl_coef=kl_coef, **kwargs)
        require("clip_range", clip_range > 0, "above 0", clip_range)
        require("gamma", 0 <= gamma <= 1, "between 0 and 1", gamma)
        require("gae_lambda", 0 <= gae_lambda <= 1, "between 0 and 1", gae_lambda)
        self.value: nn.Module | None = None

    def build(self) -> list[nn.Module]:
        """Load the policy, then its value head (which starts at 0) or the separate value network."""
        networks, hparams = super().build(), self.hparams
        if hparams.value_model:
            self.value = self.load_value_network(hparams.value_model)
        else:
            self.value = nn.Linear(self.policy.config.get_text_config().hidden_size, 1, dtype=torch.float32)
            nn.init.zeros_(self.value.weight)
            nn.init.zeros_(self.value.bias)
        return [*networks, self.value]

    def load_value_network(self, spec: str) -> Scorer:
        """The separate value network, ready to be trained."""
        hparams = self.hparams
        how = (self.backbone_dtype, hparams.trust_remote_code, hparams.load_in_4bit)
        scorer = load_scorer(spec, *how, base=shared_base(self), keep_adapter=hparams.lora_r > 0)
        if not isinstance(scorer.model, PeftModel):
            return Scorer(self.prepare_backbone(scorer.model))
        self.prepare_training(unwrapped(scorer.model))
        return scorer

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One optimizer, two named groups."""
        hparams = self.hparams
        return [
            {"params": [p for p in self.policy.parameters() if p.requires_grad], "name": "policy"},
            {
                "params": [p for p in self.value.parameters() if p.requires_grad],
                "name": "value",
                "lr": hparams.learning_rate if hparams.value_learning_rate is None else hparams.value_learning_rate,
            },
        ]

    def on_train_epoch_start(self) -> None:
        """One iteration's experience; the epoch's training steps are the update."""
        hparams = self.hparams
        with self.rollout_phase():
            samples = self.sample_and_score()  # 1. sample responses, 2. score them
            rollout, mask = samples.rollout, samples.rollout.response_mask
            stats = self.token_statistics(rollout)
            rewards = self.token_rewards(samples, stats, self.kl_coef)  # 3. charge for KL
            if hparams.whiten_rewards:
                rewards = scale_to_unit_variance(rewards, mask, self.sum_over_ranks)
            bootstrap = stats.value_after * ~rollout.ended if hparams.bootstrap_truncated else None
            estimate = gae(rewards, stats.values, mask, hparams.gamma, hparams.gae_lambda, bootstrap)  # 4. advantages
            advantages, returns = estimate
            if hparams.whiten_advantages:
                advantages = whiten(advantages, mask, self.sum_over_ranks)
        experience = PPOExperience(*rollout[:4], stats.logprobs, stats.values, advantages, returns)
        self.fill(experience)  # 5. update: training_step
        self.observe(samples, stats, value=stats.values, advantage=advantages)
        explained = explained_variance(stats.values, returns, mask, self.sum_over_ranks)
        self.log_mean("value/explained_variance", explained[None], batch_size=1)
        self.control_kl(stats, mask)

    def training_step(self, batch: PPOExperience, batch_idx: int) -> Tensor:
        """Clipped policy and value losses, summed over the response tokens of a minibatch."""
        hparams, mask = self.hparams, batch.response_mask
        said = self.read(self.policy, batch, with_entropy=self.entropy_coef > 0)
        logprobs, values = said.logprobs, self.values(batch, said.hidden)[:, :-1]
        policy_loss = clipped_policy_loss(logprobs, batch.logprobs, batch.advantages, hparams.clip_range)
        value_loss = clipped_value_loss(values, batch.values, batch.returns, hparams.clip_range_value)
        loss = policy_loss + hparams.vf_coef * value_loss  # (B, T)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * said.entropy
        clipped = is_clipped(logprobs, batch.logprobs, hparams.clip_range)
        of_values = {"value/loss": value_loss}
        if hparams.clip_range_value is not None:
            of_values["value/clip_fraction"] = (values - batch.values).abs() > hparams.clip_range_value
        self.log_update(batch, batch_idx, logprobs, policy_loss, clipped, **of_values)
        return self.mean_loss(masked_sum(loss, mask), mask.sum())

    def values(self, e: Experience | Rollout, hidden: Tensor) -> Tensor:
        """(B, T + 1) float32 values before each response token, and after the last."""
        if isinstance(self.value, nn.Linear):
            return self.value(hidden.to(self.value.weight.dtype)).squeeze(-1).float()
        per_token = (self.value.raw_per_token(*whole_sequences(e)) - self.value.mean) / self.value.std
        return per_token[:, -hidden.shape[1] :]
