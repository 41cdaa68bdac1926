"""Proximal policy optimisation with a value model, for language models.

    python train.py fit --config configs/demo/ppo.yaml

`on_train_epoch_start` and `training_step` are the algorithm. How it departs from Schulman et al. 2017
(https://arxiv.org/abs/1707.06347), as RLHF does since Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593):
1. An episode is one response; the action is a token; the score comes at the last token.
2. Every token is charged β times its KL to the reference policy.
3. The value loss is clipped too, and policy and value share one backbone (a separate value network is an option).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..functional import (
    clipped_policy_loss,
    clipped_value_loss,
    entropy,
    explained_variance,
    gae,
    is_clipped,
    kl_k3,
    kl_shaped_rewards,
    masked_sum,
    scale_to_unit_variance,
    whiten,
)
from .backbone import Scorer
from .checks import require
from .experience import Experience
from .on_policy import OnPolicyModule, whole_sequences
from .reporting import report
from .rollout import Rollout


class PPOModule(OnPolicyModule):
    """PPO: clipped policy and value losses on KL-shaped rewards, generalised advantage estimation.

    loss = Σ_t [ −min(ρ_t A_t, clip(ρ_t, 1 ± ε) A_t) + vf_coef · L_value − entropy_coef · H_t ] / number of tokens,

    ρ_t = π(token t) / π_old(token t). One epoch of the Trainer is one iteration: `rollout_batch_size` responses per
    process, `num_passes` shuffled passes over them in minibatches of `minibatch_size`; the mean is over all response
    tokens of an optimizer step.

    Args:
        model: the starting policy; see `OnPolicyModule`.
        reward: what to maximise; see `OnPolicyModule`.
        kl_coef: β, price of one nat of KL to the starting policy. Usual: 0.01 to 0.2.
        value_model: folder or hub id of a reward model from which a separate value network starts, which is trained
            whole; None puts a linear value head on the policy's last hidden state.
        clip_range: ε of the policy ratio. Usual: 0.2.
        clip_range_value: how far values may move from the old ones before the loss is flat; None does not clip.
        vf_coef: weight of the value loss. Usual: 0.1 to 1.
        entropy_coef: weight of the entropy bonus. Usual in RLHF: 0.
        gamma: discount per token. Usual in RLHF: 1.
        gae_lambda: λ of generalised advantage estimation: 1 is Monte Carlo, 0 one-step TD. Usual: 0.95.
        whiten_rewards: scale KL-shaped rewards to standard deviation 1 over all ranks, mean kept.
        whiten_advantages: shift and scale advantages to mean 0, standard deviation 1 over all ranks.
        bootstrap_truncated: a response that hit the length limit goes on with the value after its last token instead
            of 0.
        target_kl: stop an iteration's updates when a minibatch's KL(old ‖ new) per token exceeds this; None goes on.
        value_learning_rate: of the value head or network; None is `learning_rate`.
        **kwargs: see `OnPolicyModule` and `TextModule`.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward: str | list[str] | None = None,
        *,
        kl_coef: float = 0.05,
        value_model: str | None = None,
        clip_range: float = 0.2,
        clip_range_value: float | None = 0.2,
        vf_coef: float = 0.1,
        entropy_coef: float = 0.0,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        whiten_rewards: bool = False,
        whiten_advantages: bool = True,
        bootstrap_truncated: bool = False,
        target_kl: float | None = None,
        value_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, reward, kl_coef=kl_coef, **kwargs)
        require("clip_range", clip_range > 0, "above 0", clip_range)
        require("gamma", 0 <= gamma <= 1, "between 0 and 1", gamma)
        require("gae_lambda", 0 <= gae_lambda <= 1, "between 0 and 1", gae_lambda)
        self.value: nn.Module | None = None
        self._approx_kl = 0.0

    def build(self) -> list[nn.Module]:
        """Load the policy, then its value head (which starts at 0) or the separate value network."""
        networks, hparams = super().build(), self.hparams
        if hparams.value_model:
            self.value = Scorer.load(hparams.value_model, self.backbone_dtype, hparams.trust_remote_code)
            self.prepare_training(self.value.model)
        else:
            self.value = nn.Linear(self.policy.config.get_text_config().hidden_size, 1, dtype=torch.float32)
            nn.init.zeros_(self.value.weight)
            nn.init.zeros_(self.value.bias)
        return [*networks, self.value]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One optimizer, two named groups."""
        hparams = self.hparams
        return [
            {"params": [p for p in self.policy.parameters() if p.requires_grad], "name": "policy"},
            {
                "params": list(self.value.parameters()),
                "name": "value",
                "lr": hparams.learning_rate if hparams.value_learning_rate is None else hparams.value_learning_rate,
            },
        ]

    def on_train_epoch_start(self) -> None:
        """One iteration's experience; the epoch's training steps are the update."""
        hparams = self.hparams
        with self.rollout_phase():
            prompts = self.next_prompts()
            rollout = self.roll_out(prompts, self.own_rows(), self.current_epoch)  # 1. sample responses
            mask = rollout.response_mask
            responses, scores = self.score(rollout, prompts)  # 2. score them
            stats = self.token_statistics(rollout)
            shaped = self.shaped_scores(scores.total, rollout.ended)
            rewards = kl_shaped_rewards(shaped, self.kl(stats), mask, self.kl_coef)  # 3. charge for KL
            if hparams.whiten_rewards:
                rewards = scale_to_unit_variance(rewards, mask, self.sum_over_ranks)
            bootstrap = stats.value_after * ~rollout.ended if hparams.bootstrap_truncated else None
            estimate = gae(rewards, stats.values, mask, hparams.gamma, hparams.gae_lambda, bootstrap)  # 4. advantages
            advantages, returns = estimate
            if hparams.whiten_advantages:
                advantages = whiten(advantages, mask, self.sum_over_ranks)
        self.fill(
            Experience(*rollout[:4], stats.logprobs, stats.values, advantages, returns)
        )  # 5. update: training_step
        self.samples = report(self, "rollout", prompts, responses, rollout, scores, stats)
        explained = explained_variance(stats.values, returns, mask, self.sum_over_ranks)
        self.log_mean("value/explained_variance", explained[None], batch_size=1)
        self.control_kl(stats, mask)

    def training_step(self, batch: Experience, batch_idx: int) -> Tensor:
        """Clipped policy and value losses, summed over the response tokens of a minibatch."""
        hparams, mask = self.hparams, batch.response_mask
        logits, hidden = self.response_outputs(self.policy, batch)
        logprobs, values = self.logprobs(logits, batch), self.values(batch, hidden)[:, :-1]
        policy_loss = clipped_policy_loss(logprobs, batch.logprobs, batch.advantages, hparams.clip_range)
        value_loss = clipped_value_loss(values, batch.values, batch.returns, hparams.clip_range_value)
        loss = policy_loss + hparams.vf_coef * value_loss  # (B, T)
        if hparams.entropy_coef:
            loss = loss - hparams.entropy_coef * entropy(logits, hparams.temperature)
        self._log_update(batch, logprobs, policy_loss, value_loss)
        return self.mean_loss(masked_sum(loss, mask), mask.sum())

    @torch.no_grad()
    def _log_update(self, batch: Experience, logprobs: Tensor, policy_loss: Tensor, value_loss: Tensor) -> None:
        mask = batch.response_mask
        approx_kl = kl_k3(batch.logprobs, logprobs)  # of KL(old ‖ new): the tokens are from the old policy
        per_token = {
            "policy/loss": policy_loss,
            "policy/approx_kl": approx_kl,
            "policy/clip_fraction": is_clipped(logprobs, batch.logprobs, self.hparams.clip_range),
            "policy/ratio": (logprobs - batch.logprobs).exp(),
            "value/loss": value_loss,
        }
        for name, values in per_token.items():
            self.log_mean(name, values, mask, prog_bar=name == "policy/clip_fraction", batch_size=len(mask))
        if self.hparams.target_kl is not None:
            sums = torch.stack([masked_sum(approx_kl, mask), mask.sum().float()])
            total, count = self.sum_over_ranks(sums).tolist()
            self._approx_kl = total / count

    def on_train_batch_start(self, batch: Experience, batch_idx: int) -> int | None:
        """End the iteration's updates, on all ranks together, once the policy has moved too far."""
        target = self.hparams.target_kl
        starts_a_step = batch_idx % self.trainer.accumulate_grad_batches == 0
        if target is None or batch_idx == 0 or not starts_a_step or self._approx_kl <= target:
            return None
        return -1  # Lightning skips the rest of the epoch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What early stopping goes by goes along."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["on_policy"]["approx_kl"] = self._approx_kl

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What early stopping goes by comes back."""
        super().on_load_checkpoint(checkpoint)
        self._approx_kl = checkpoint["on_policy"]["approx_kl"]

    def values(self, e: Rollout | Experience, hidden: Tensor) -> Tensor:
        """(B, T + 1) float32 values before each response token, and after the last."""
        if isinstance(self.value, nn.Linear):
            return self.value(hidden.to(self.value.weight.dtype)).squeeze(-1).float()
        per_token = (self.value.raw_per_token(*whole_sequences(e)) - self.value.mean) / self.value.std
        return per_token[:, -hidden.shape[1] :]
