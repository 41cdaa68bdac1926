"""What PPO and the group methods share: a price on KL to the reference, and watching how far an update moves."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..functional import adaptive_kl_coef, kl_k1, kl_k2, kl_k3, kl_shaped_rewards, masked_sum
from .checks import require
from .experience import TokenStatistics
from .on_policy import OnPolicyModule
from .rollout_module import Reward
from .samples import Samples

STATE = ("kl_coef", "entropy_coef", "_approx_kl")
KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


class PolicyGradientModule(OnPolicyModule):
    """Base of PPO and GRPO.

    Args:
        model: the starting policy; see `OnPolicyModule`.
        reward: what to maximise; see `RolloutModule`.
        kl_coef: β, price of one nat of KL to the reference, in units of reward. Usual: 0.01 to 0.2.
        kl_target: mean sequence KL, in nats, at which an adaptive coefficient aims; None keeps `kl_coef` fixed.
        kl_horizon: episodes over which the adaptive coefficient moves (Ziegler et al. 2019: 10,000).
        kl_estimator: of the penalty per token: k1 is unbiased with the right gradient in a reward; k2, k3 are never
            negative.
        entropy_coef: weight of the entropy bonus. Usual in RLHF: 0.
        target_kl: stop an iteration's updates when a minibatch's KL(old ‖ new) per token exceeds this; None goes on.
        **kwargs: see `OnPolicyModule`, `RolloutModule` and `TextModule`.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward: Reward | None = None,
        *,
        kl_coef: float,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        kl_estimator: Literal["k1", "k2", "k3"] = "k1",
        entropy_coef: float = 0.0,
        target_kl: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, reward, **kwargs)
        require("kl_coef", kl_coef >= 0, "at least 0", kl_coef)
        require("kl_estimator", kl_estimator in KL_ESTIMATORS, f"one of {list(KL_ESTIMATORS)}", kl_estimator)
        self.kl_coef, self.entropy_coef = kl_coef, entropy_coef
        self._approx_kl = 0.0

    def kl(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """(B, T) KL to the reference per token, by the estimator of `kl_estimator`."""
        return KL_ESTIMATORS[self.hparams.kl_estimator](logprobs, ref_logprobs)

    def token_rewards(self, samples: Samples, statistics: TokenStatistics, kl_coef: float) -> Tensor:
        """(B, T): −β · KL at every token, the shaped score at the last, rewards of tokens where they were earned."""
        kl, at_tokens = self.kl(statistics.logprobs, statistics.ref_logprobs), samples.scores.per_token
        at_end = samples.scores.total if at_tokens is None else samples.scores.total - at_tokens.sum(1)
        scores = self.shaped_scores(at_end, samples.rollout)
        rewards = kl_shaped_rewards(scores, kl, samples.rollout.response_mask, kl_coef)
        return rewards if at_tokens is None else rewards + at_tokens

    def control_kl(self, statistics: TokenStatistics, mask: Tensor) -> None:
        """Move an adaptive `kl_coef` after an iteration, by the KL over all ranks."""
        hparams = self.hparams
        if hparams.kl_target is None:
            return
        episodes = torch.ones_like(mask[:, 0], dtype=torch.float64).sum()
        sums = torch.stack([masked_sum(kl_k1(*statistics[:2]), mask).double(), episodes])
        total, count = self.sum_over_ranks(sums).tolist()
        self.kl_coef = adaptive_kl_coef(self.kl_coef, total / count, hparams.kl_target, hparams.kl_horizon, int(count))

    @torch.no_grad()
    def log_update(
        self, batch: NamedTuple, batch_idx: int, logprobs: Tensor, loss: Tensor, clipped: Tensor, **others: Tensor
    ) -> None:
        """Log a minibatch's figures per token, and note how far the policy has moved since it sampled."""
        mask = batch.response_mask
        ratio = (logprobs - batch.logprobs).exp()
        approx_kl = kl_k3(batch.logprobs, logprobs)  # of KL(old ‖ new): the tokens are from the old policy
        per_token = {
            "policy/loss": loss,
            "policy/approx_kl": approx_kl,
            "policy/clip_fraction": clipped,
            "policy/ratio": ratio,
        }
        for name, values in (per_token | others).items():
            self.log_mean(name, values, mask, prog_bar=name == "policy/clip_fraction", batch_size=len(mask))
        self.log_range("policy/ratio", ratio[mask], batch_size=len(mask))
        if batch_idx < self.trainer.accumulate_grad_batches:  # nothing has moved yet
            self.log_largest("policy/first_ratio_error", (logprobs - batch.logprobs)[mask].abs(), batch_size=len(mask))
        if self.hparams.target_kl is not None:
            sums = torch.stack([masked_sum(approx_kl, mask), mask.sum().float()])
            total, count = self.sum_over_ranks(sums).tolist()
            self._approx_kl = total / count

    def on_train_batch_start(self, batch: NamedTuple, batch_idx: int) -> int | None:
        """End the iteration's updates, on all ranks together, once the policy has moved too far."""
        target = self.hparams.target_kl
        starts_a_step = batch_idx % self.trainer.accumulate_grad_batches == 0
        if target is None or batch_idx == 0 or not starts_a_step or self._approx_kl <= target:
            return super().on_train_batch_start(batch, batch_idx)
        return -1  # Lightning skips the rest of the epoch

    def on_train_epoch_end(self) -> None:
        """The prices of KL and of entropy go into the log, too."""
        super().on_train_epoch_end()
        self.log("policy/entropy_coef", self.entropy_coef, sync_dist=True)
        self.log("policy/kl_coef", self.kl_coef, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The coefficients and what early stopping goes by go along."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["on_policy"] |= {name: getattr(self, name) for name in STATE}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The coefficients and what early stopping goes by come back."""
        super().on_load_checkpoint(checkpoint)
        for name in STATE:
            setattr(self, name, checkpoint["on_policy"][name])
