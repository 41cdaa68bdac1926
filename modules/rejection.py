"""Rejection sampling: best-of-n, and fine-tuning on what it picks. The baselines that papers compare with.

python train.py fit --config configs/rft.yaml                  # learn from the best of G
python train.py validate --model BestOfNModule ...             # answer with the best of n
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..functional import grouped, has_spread, masked_sum
from .checks import require
from .experience import Experience
from .on_policy import OnPolicyModule
from .reporting import report, seen
from .rollout_module import Reward, RolloutModule
from .samples import Samples, chosen, repeated


def best_rows(scores: Tensor, group_size: int) -> list[int]:
    """Row of the highest score of each group; of equal ones the first."""
    best = grouped(scores, group_size).argmax(dim=1)  # (groups,)
    return (best + group_size * torch.arange(len(best), device=best.device)).tolist()


class RFTModule(OnPolicyModule):
    """Rejection-sampling fine-tuning: sample G responses to a prompt, keep the best, raise its likelihood.

    loss = − Σ_t log π(token t | all before it) / number of tokens,  over the best responses

    Sampled from the reference, the limit is the best-of-G distribution of it: with F(r) the share of responses with a
    reward of at most r, the response y (of a reward r that no other has) has probability F(r)^G − (F(r) − π_ref(y))^G,
    whose KL to the reference is at most log G − (G − 1)/G. Sampled from the policy itself, each iteration goes on from
    the last.

    Source: Dong et al. 2023, "RAFT", https://arxiv.org/abs/2304.06767; Yuan et al. 2023, https://arxiv.org/abs/2308.01825.

    Args:
        model: the starting policy; see `OnPolicyModule`.
        reward: what to pick the best by; see `RolloutModule`.
        group_size: G, responses per prompt. Usual: 4 to 64.
        from_reference: sample from the reference, else from the policy as it is. In the first case `rollout/kl` is
            −KL(reference ‖ policy).
        **kwargs: see `OnPolicyModule`, `RolloutModule` and `TextModule`; an iteration learns from
            `rollout_batch_size` / `group_size` sequences.
    """

    learned_from = "rollout_batch_size / group_size"

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward: Reward | None = None,
        *,
        group_size: int = 4,
        from_reference: bool = False,
        **kwargs: Any,
    ) -> None:
        require("group_size", group_size >= 2, "at least 2, to pick the best of", group_size)
        super().__init__(model, reward, group_size=group_size, **kwargs)

    @property
    def learned_rows(self) -> int:
        """One response per prompt."""
        return self.hparams.rollout_batch_size // self.hparams.group_size

    @contextmanager
    def sampler(self) -> Iterator[nn.Module]:
        """The reference or the policy in training; the policy where it is evaluated."""
        if not (self.hparams.from_reference and self.trainer.training):
            yield self.policy
            return
        with self.reference() as network:
            yield network

    @property
    def sampled_networks(self) -> list[nn.Module]:
        """The policy and, if it is no part of it, the reference."""
        return [network for network in (self.policy, self.reference.copy) if network is not None]

    def on_train_epoch_start(self) -> None:
        """One iteration's best responses; the epoch's training steps learn them."""
        with self.rollout_phase():
            samples = self.sample_and_score()
            stats = self.token_statistics(samples.rollout)
            rows = best_rows(self.shaped_scores(samples.scores.total, samples.rollout), self.hparams.group_size)
        self.fill(Experience(*chosen(samples.rollout, rows)[:4]))
        self.observe(samples, stats)
        spread = has_spread(samples.scores.total, self.hparams.group_size)
        lengths = samples.rollout.response_mask.sum(1)
        self.log_mean("rollout/best_reward", samples.scores.total[rows], batch_size=1)
        self.log_mean("rollout/best_length", lengths[rows].float(), batch_size=1)
        self.log_mean("rollout/groups_with_spread", spread.float(), batch_size=1)

    def training_step(self, batch: Experience, batch_idx: int) -> Tensor:
        """Summed negative log-likelihood of the best responses."""
        logprobs = self.read(self.policy, batch).logprobs
        return self.mean_loss(-masked_sum(logprobs, batch.response_mask), batch.response_mask.sum())


class BestOfNModule(RolloutModule):
    """Best-of-n: sample n responses, answer with the one that the reward likes most. Nothing is trained.

    For `validate`, `test` and `predict`. The KL that is reported as `val/kl_bound` is log n − (n − 1)/n, an upper bound
    of that of the best-of-n policy to the policy it samples from.

    Source: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325; the bound: Beirami et al. 2024,
    https://arxiv.org/abs/2401.01879.

    Args:
        model: the policy.
        reward: what to pick by; see `RolloutModule`.
        n: responses per prompt. Usual: 4 to 64.
        **kwargs: see `RolloutModule` and `TextModule`.
    """

    def __init__(
        self, model: str | PreTrainedModel, reward: Reward | None = None, *, n: int = 8, **kwargs: Any
    ) -> None:
        require("n", n >= 2, "at least 2", n)
        super().__init__(model, reward, **kwargs)

    def setup(self, stage: str) -> None:
        """Nothing can be trained, and nothing be picked without a reward."""
        super().setup(stage)
        if stage == "fit":
            raise ValueError("`BestOfNModule` trains nothing: use validate, test or predict; to train, `RFTModule`.")
        if not self.rewards.terms:
            raise ValueError("`reward` is required to pick the best of n.")

    def training_step(self, *_: Any) -> None:
        """There is none; but Lightning asks for it before `setup` can say so."""

    def best_and_worst(self, batch: dict[str, Any], stream: int) -> tuple[Samples, Samples, Tensor]:
        """Of n responses to each prompt, and (B,) by how much their scores differ, penalties included."""
        n, first = self.hparams.n, self.next_rows(len(batch["prompts"]))
        rows = [row * n + i for row in first for i in range(n)]
        prompts = repeated(batch, n)
        samples = self.score(self.roll_out(prompts, rows, stream), prompts)
        scores = self.shaped_scores(samples.scores.total, samples.rollout)
        best, worst = best_rows(scores, n), best_rows(-scores, n)
        return chosen(samples, best), chosen(samples, worst), scores[best] - scores[worst]

    def _evaluate(self, batch: dict[str, Any], batch_idx: int, stage: str) -> dict[str, list]:
        n = self.hparams.n
        with self.rollout_weights():
            samples, *_ = self.best_and_worst(batch, -1)
            columns = report(self, stage, samples, self.token_statistics(samples.rollout))
        self._seen.append(seen(samples))
        bound = torch.tensor([n]).log() - (n - 1) / n
        self.log_mean(f"{stage}/kl_bound", bound.to(self.device), batch_size=1)
        return columns

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list]:
        """The best responses, the worst, and by how much: an answer, or a pair for `PreferenceDataModule`."""
        with self.rollout_weights():
            best, worst, margin = self.best_and_worst(batch, -2)
        return {
            "prompt": best.prompts,
            "chosen": best.responses,
            "rejected": worst.responses,
            "reward": best.scores.total.tolist(),
            "margin": margin.tolist(),
        }
