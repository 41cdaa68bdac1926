"""What on-policy methods share: one Lightning epoch is one iteration.

At the start of an epoch a module samples responses, scores them and fills its experience; the epoch's batches are then
shuffled minibatches of that experience, and everything else (optimizer steps, clipping, accumulation, schedules,
checkpoints, strategies) is Lightning's own. `PromptDataModule` hands over its prompts through `experience_dataloader`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..functional import (
    adaptive_kl_coef,
    entropy,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_sum,
    penalize_missing_eos,
    token_logprobs,
)
from .backbone import response_outputs
from .checks import require
from .experience import Experience, ExperienceDataset, TokenStatistics, experience_loader, of_all_ranks
from .reference import FrozenReference
from .reporting import report
from .rollout import Rollout, Sampling, row_noise, sample, texts, trimmed
from .scoring import Scores, WeightedRewards, reward_terms
from .sharding import num_chunks
from .text_module import TextModule

SLOWEST = dict(sync_dist=True, reduce_fx="max")
KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


class OnPolicyModule(TextModule):
    """Base of PPO and its relatives: prompts in, responses, rewards and their log-probabilities out.

    Args:
        model: the starting policy, usually the SFT model's folder; it is also the reference of the KL penalty.
        reward: what to maximise: a reward model (folder, hub id, `.ckpt` of a RewardModule), the dotted path of a
            Python function `f(prompts, responses, **columns) -> list of floats`, or a list of these.
        reward_weights: one weight per reward, 1 each by default. Weight 0 logs a reward without training on it.
        rollout_batch_size: responses per iteration on each process.
        minibatch_size: responses per minibatch on each process; divides `rollout_batch_size`.
        num_passes: passes over each iteration's experience, K in the PPO paper. Usual: 1 to 4.
        max_new_tokens: longest response, in tokens.
        min_new_tokens: no EOS before this many tokens. It is part of the policy: log-probabilities know it.
        temperature: of sampling; log-probabilities of policy and reference are taken at the same temperature.
        kl_coef: β, price of one nat of KL to the reference, in units of reward. Usual: 0.01 to 0.2.
        kl_target: mean sequence KL, in nats, at which an adaptive coefficient aims; None keeps `kl_coef` fixed.
        kl_horizon: episodes over which the adaptive coefficient moves (Ziegler et al. 2019: 10,000).
        kl_estimator: of the penalty per token: k1 is unbiased with the right gradient; k2, k3 are never negative.
        score_clip: scores are cut to ± this; None does not cut.
        normalize_scores: subtract the mean and divide by the standard deviation of all scores of the run so far.
        missing_eos_penalty: subtracted from the score of a response that hit the length limit.
        forward_batch_size: most sequences in one scoring pass (policy, reference, reward model); sampling takes all at
            once.
        **kwargs: see `TextModule`.
    """

    exported = "policy"

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward: str | list[str] | Callable | nn.Module | None = None,
        *,
        kl_coef: float,
        reward_weights: list[float] | None = None,
        rollout_batch_size: int = 64,
        minibatch_size: int = 16,
        num_passes: int = 4,
        max_new_tokens: int = 64,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        kl_estimator: Literal["k1", "k2", "k3"] = "k1",
        score_clip: float | None = None,
        normalize_scores: bool = False,
        missing_eos_penalty: float = 0.0,
        forward_batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        require("rollout_batch_size", rollout_batch_size >= 1, "at least 1", rollout_batch_size)
        require("num_passes", num_passes >= 1, "at least 1", num_passes)
        require("temperature", temperature > 0, "above 0", temperature)
        require("min_new_tokens", 0 <= min_new_tokens <= max_new_tokens, f"0 to {max_new_tokens=}", min_new_tokens)
        require("kl_coef", kl_coef >= 0, "at least 0", kl_coef)
        if rollout_batch_size % minibatch_size:
            raise ValueError(
                f"`minibatch_size` must divide `rollout_batch_size`: {rollout_batch_size} / {minibatch_size} = "
                f"{rollout_batch_size / minibatch_size:g}."
            )
        terms = [] if reward is None else reward_terms(reward, self.hparams.dtype, forward_batch_size)
        self.rewards = WeightedRewards(terms, reward_weights)
        self.policy: nn.Module | None = None
        self.samples: dict[str, list] = {}
        """The last rollout as columns: prompt, response, reward, kl, length, ended, reward/<name>."""
        self.kl_coef = kl_coef
        self.score_moments = [0.0, 0.0, 0.0]  # count, sum, sum of squares of all scores so far
        self._experience: ExperienceDataset | None = None
        self._resumed: Experience | None = None  # of a checkpoint from within an iteration
        self._prompts: Any = None

    # --- building -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check what can be checked before a model is loaded."""
        super().setup(stage)
        hparams, accumulate = self.hparams, self.trainer.accumulate_grad_batches
        if stage != "predict" and not self.rewards.terms:
            raise ValueError(
                "`reward` is required to fit, validate or test: a reward model, a dotted path of a function, or a list."
            )
        minibatches = hparams.rollout_batch_size // hparams.minibatch_size
        if stage == "fit" and minibatches % accumulate:
            raise ValueError(
                "`accumulate_grad_batches` must divide the minibatches of one pass: rollout_batch_size / "
                f"minibatch_size = {hparams.rollout_batch_size} / {hparams.minibatch_size} = {minibatches}, and "
                f"{minibatches} / {accumulate} = {minibatches / accumulate:g}."
            )

    def build(self) -> list[nn.Module]:
        """Load the policy and its frozen reference."""
        networks = super().build()
        self.reference = FrozenReference(self.policy)
        return networks if self.reference.copy is None else [*networks, self.reference.copy]

    @property
    def sampling(self) -> Sampling:
        """How responses are sampled."""
        h = self.hparams
        return Sampling.of(
            self.policy, self.tokenizer, h.max_new_tokens, min_new_tokens=h.min_new_tokens, temperature=h.temperature
        )

    def experience_dataloader(self, prompts: Any) -> DataLoader:
        """Take the stream of prompts, give the loader over the experience. `PromptDataModule` calls this."""
        h = self.hparams
        self._prompts = prompts
        ranks = self.trainer.world_size, self.global_rank
        self._experience = self._experience or ExperienceDataset(h.rollout_batch_size * self.trainer.world_size)
        return experience_loader(self._experience, h.minibatch_size, h.num_passes, self.seed, *ranks)

    # --- one iteration --------------------------------------------------------------------------------------------

    @contextmanager
    def rollout_phase(self) -> Iterator[None]:
        """Precision as in a training step, no gradient (inference mode's tensors could not enter autograd later)."""
        self._start = time.perf_counter()
        with self.trainer.precision_plugin.forward_context(), torch.no_grad(), self.rollout_weights():
            yield
        torch.clear_autocast_cache()  # it may hold weights that were cast without gradient
        self._update_start = time.perf_counter()
        self.log("time/rollout", self._update_start - self._start, **SLOWEST)

    def next_prompts(self) -> dict[str, Any]:
        """The next prompts of this rank, on its device."""
        batch = self._prompts.take(self.hparams.rollout_batch_size)
        return self.trainer.strategy.batch_to_device(batch)

    def roll_out(self, prompts: dict[str, Any], rows: Sequence[int], stream: int) -> Rollout:
        """Sample one response per prompt. The noise depends on seed, stream and row number, and on no other state."""
        noise = row_noise(rows, self.hparams.max_new_tokens, self.seed, stream).to(self.device)
        ids, mask = prompts["input_ids"], prompts["attention_mask"]
        return sample(self.policy, ids, mask, self.sampling, noise, self.any_rank)

    def own_rows(self) -> range:
        """Numbers of this rank's responses among those of all ranks in an iteration."""
        size = self.hparams.rollout_batch_size
        return range(self.global_rank * size, (self.global_rank + 1) * size)

    def score(self, rollout: Rollout, prompts: dict[str, Any]) -> tuple[list[str], Scores]:
        """Responses as text and their rewards."""
        responses = texts(rollout, self.tokenizer)
        scores = self.rewards.to(self.device, self.mesh)(prompts["prompts"], responses, prompts.get("columns", {}))
        components = {name: values.to(self.device) for name, values in scores.components.items()}
        return responses, Scores(torch.as_tensor(scores.total, device=self.device), components)

    def shaped_scores(self, scores: Tensor, ended: Tensor) -> Tensor:
        """Scores (B,) after normalisation, clipping and the penalty for a missing EOS, in this order."""
        hparams = self.hparams
        if hparams.normalize_scores:
            new = torch.stack([torch.ones_like(scores).sum(), scores.sum(), scores.square().sum()]).double()
            self.score_moments = [
                a + b for a, b in zip(self.score_moments, self.sum_over_ranks(new).tolist(), strict=True)
            ]
            count, total, squares = self.score_moments
            variance = max(squares / count - (total / count) ** 2, 0.0)
            scores = (scores - total / count) / (variance**0.5 + 1e-8)
        if hparams.score_clip is not None:
            scores = scores.clamp(-hparams.score_clip, hparams.score_clip)
        return penalize_missing_eos(scores, ended, hparams.missing_eos_penalty)

    def token_statistics(self, rollout: Rollout) -> TokenStatistics:
        """One pass of the policy and one of the reference over sampled responses, in chunks."""
        rows, width = rollout.response_ids.shape
        pieces = num_chunks(rows, self.hparams.forward_batch_size, self.mesh)
        chunks = []
        for fields in zip(*(field.tensor_split(pieces) for field in rollout), strict=True):
            chunk = trimmed(Rollout(*fields))
            found = self._chunk_statistics(chunk)
            padding = (0, width - chunk.response_ids.shape[1])
            per_token = [nn.functional.pad(x.masked_fill(~chunk.response_mask, 0), padding) for x in found[:4]]
            chunks.append([*per_token, found.value_after])
        return TokenStatistics(*(torch.cat(column) for column in zip(*chunks, strict=True)))

    def _chunk_statistics(self, chunk: Rollout) -> TokenStatistics:
        logits, hidden = self.response_outputs(self.policy, chunk)
        logprobs, entropies = self.logprobs(logits, chunk), entropy(logits, self.hparams.temperature)
        values = self.values(chunk, hidden)  # (B, T + 1)
        value_after = values.gather(1, chunk.response_mask.sum(1, keepdim=True)).squeeze(1)
        with self.reference() as reference:
            ref_logprobs = self.logprobs(self.response_outputs(reference, chunk)[0], chunk)
        return TokenStatistics(logprobs, ref_logprobs, entropies, values[:, :-1], value_after)

    def response_outputs(self, model: nn.Module, e: Rollout | Experience) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) that were sampled from, and hidden states (B, T + 1, H), of a Rollout or an Experience."""
        logits, hidden = response_outputs(model, *whole_sequences(e), e.response_ids.shape[1])
        return self.sampling.constrain(logits), hidden

    def logprobs(self, logits: Tensor, e: Rollout | Experience) -> Tensor:
        """(B, T) log-probabilities of the response tokens, at the sampling temperature."""
        return token_logprobs(logits, e.response_ids, self.hparams.temperature)

    def values(self, e: Rollout | Experience, hidden: Tensor) -> Tensor:
        """(B, T + 1) values before each response token and after the last; methods without a value model have 0."""
        return torch.zeros(hidden.shape[:2], device=hidden.device)

    def fill(self, experience: Experience) -> None:
        """Give the epoch's batches their content: the experience of all ranks."""
        self._experience.experience = of_all_ranks(experience)

    def kl(self, statistics: TokenStatistics) -> Tensor:
        """(B, T) KL penalty per token, by the estimator of `kl_estimator`."""
        return KL_ESTIMATORS[self.hparams.kl_estimator](statistics.logprobs, statistics.ref_logprobs)

    def control_kl(self, statistics: TokenStatistics, mask: Tensor) -> None:
        """Move an adaptive `kl_coef` after an iteration, by the KL over all ranks."""
        hparams = self.hparams
        if hparams.kl_target is None:
            return
        episodes = torch.ones_like(mask[:, 0], dtype=torch.float64).sum()
        sums = torch.stack([masked_sum(kl_k1(*statistics[:2]), mask).double(), episodes])
        total, count = self.sum_over_ranks(sums).tolist()
        self.kl_coef = adaptive_kl_coef(self.kl_coef, total / count, hparams.kl_target, hparams.kl_horizon, int(count))

    # --- what is seen ---------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """An iteration that a stopped run began goes on with its experience, and is timed from here."""
        super().on_train_start()
        self._experience.experience, self._resumed = self._resumed, None
        self._start = self._update_start = self._update_end = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Experience, batch_idx: int) -> None:
        """The update ends with the last batch; validation may follow before the epoch ends."""
        self._update_end = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        """Time and throughput of the iteration, validation left out."""
        tokens = float(sum(self.samples.get("length", [])))  # none on other ranks that resumed within the iteration
        self.log("policy/kl_coef", self.kl_coef, sync_dist=True)
        self.log("time/update", self._update_end - self._update_start, **SLOWEST)
        seconds = self._update_end - self._start
        if seconds > 0:  # else a resumed run found nothing left to do in this iteration
            self.log("throughput/tokens_per_second", tokens / seconds, sync_dist=True, reduce_fx="sum")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list]:
        """Sample on held-out prompts; the same noise meets the same prompts at every evaluation."""
        return self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list]:
        """Sample on test prompts."""
        return self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: dict[str, Any], batch_idx: int, stage: str) -> dict[str, list]:
        with self.rollout_weights():
            rollout = self.roll_out(batch, self.next_rows(len(batch["prompts"])), -1)
            responses, scores = self.score(rollout, batch)
            statistics = self.token_statistics(rollout)
        return report(self, stage, batch, responses, rollout, scores, statistics)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list]:
        """Sampled responses, with their rewards if `reward` is given."""
        with self.rollout_weights():
            rollout = self.roll_out(batch, self.next_rows(len(batch["prompts"])), -2)
        if not self.rewards.terms:
            return {"prompt": batch["prompts"], "response": texts(rollout, self.tokenizer)}
        responses, scores = self.score(rollout, batch)
        return {"prompt": batch["prompts"], "response": responses, "reward": scores.total.tolist()}

    # --- checkpoints and export -----------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The KL coefficient and the score moments go along; within an iteration its experience, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["on_policy"] = {"kl_coef": self.kl_coef, "score_moments": self.score_moments}
        if self.is_within_epoch():
            experience = [field.cpu() for field in self._experience.experience]
            checkpoint["on_policy"] |= {"experience": experience, "samples": self.samples}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The KL coefficient and the score moments come back."""
        super().on_load_checkpoint(checkpoint)
        self.kl_coef = checkpoint["on_policy"]["kl_coef"]
        self.score_moments = checkpoint["on_policy"]["score_moments"]
        if fields := checkpoint["on_policy"].get("experience"):
            self._resumed = Experience(*(field.to(self.device) for field in fields))
            self.samples = checkpoint["on_policy"]["samples"] if self.global_rank == 0 else {}


def whole_sequences(e: Rollout | Experience) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of prompt + response, both (B, P + T)."""
    ids = torch.cat([e.prompt_ids, e.response_ids], dim=1)
    return ids, torch.cat([e.prompt_mask, e.response_mask], dim=1).long()
