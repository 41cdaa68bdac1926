"""What on-policy methods share: one Lightning epoch is one iteration.

At the start of an epoch a module samples responses, scores them and fills its experience; the epoch's batches are then
shuffled minibatches of that experience, and everything else (optimizer steps, clipping, accumulation, schedules,
checkpoints, strategies) is Lightning's own. `PromptDataModule` hands over its prompts through `experience_dataloader`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..functional import entropy, penalize_missing_eos, soft_overlong_penalty, token_logprobs
from .backbone import load_causal_lm, response_outputs
from .checks import require, require_divides
from .experience import Experience, ExperienceDataset, TokenStatistics, experience_loader, of_all_ranks
from .reference import FrozenReference
from .reporting import report
from .rollout import Rollout, Sampling, row_noise, sample, texts, trimmed
from .samples import Samples, repeated
from .scoring import Responses, Scores, WeightedRewards, reward_terms
from .sharding import num_chunks
from .sharing import shared_base
from .text_module import TextModule

Reward = str | dict | list[str | dict | Callable | nn.Module] | Callable | nn.Module
SLOWEST = dict(sync_dist=True, reduce_fx="max")


class OnPolicyModule(TextModule):
    """Base of PPO and its relatives: prompts in, responses, rewards and their log-probabilities out.

    Args:
        model: the starting policy, usually the SFT model's folder.
        reward: what to maximise: a reward model (folder, hub id, `.ckpt` of a RewardModule), the dotted path of a
            Python function `f(prompts, responses, **columns) -> list of floats`, the URL of a service, a class with
            `class_path` and `init_args`, or a list of these; see docs/rewards.md.
        reward_weights: one weight per reward, 1 each by default. Weight 0 logs a reward without training on it.
        normalize_rewards: bring rewards to one scale, by their means and standard deviations so far, before they are
            weighted.
        reference: the policy to stay close to, and to which KL is measured, a folder or hub id; None is the starting
            policy itself: with LoRA the adapter switched off, else a frozen copy.
        rollout_batch_size: responses per iteration on each process.
        group_size: G, responses per prompt; divides `rollout_batch_size`.
        minibatch_size: sequences per minibatch on each process; divides those that an iteration learns from, which for
            most methods is `rollout_batch_size`.
        num_passes: passes over each iteration's experience, K in the PPO paper. Usual: 1 to 4.
        max_new_tokens: longest response, in tokens.
        min_new_tokens: no EOS before this many tokens. It is part of the policy: log-probabilities know it.
        temperature: of sampling; log-probabilities of policy and reference are taken at the same temperature.
        score_clip: scores are cut to ± this; None does not cut.
        normalize_scores: subtract the mean and divide by the standard deviation of all scores of the run so far.
        missing_eos_penalty: subtracted from the score of a response that hit the length limit.
        overlong_buffer: over so many tokens before the length limit, a penalty from 0 to 1 is subtracted from the score
            (DAPO); 0 is off.
        forward_batch_size: most sequences in one scoring pass (policy, reference, reward model); sampling takes all at
            once.
        **kwargs: see `TextModule`.
    """

    exported = "policy"
    experience_type: type[NamedTuple] = Experience
    rows_together = 1  # rows of the experience that minibatches do not part: 2 for pairs

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward: Reward | None = None,
        *,
        reward_weights: list[float] | None = None,
        normalize_rewards: bool = False,
        reference: str | None = None,
        rollout_batch_size: int = 64,
        group_size: int = 1,
        minibatch_size: int = 16,
        num_passes: int = 4,
        max_new_tokens: int = 64,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        score_clip: float | None = None,
        normalize_scores: bool = False,
        missing_eos_penalty: float = 0.0,
        overlong_buffer: int = 0,
        forward_batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        require("rollout_batch_size", rollout_batch_size >= 1, "at least 1", rollout_batch_size)
        require("num_passes", num_passes >= 1, "at least 1", num_passes)
        require("reference", isinstance(reference, str | None), "a folder or hub id", type(reference).__name__)
        require("temperature", temperature > 0, "above 0", temperature)
        require("min_new_tokens", 0 <= min_new_tokens <= max_new_tokens, f"0 to {max_new_tokens=}", min_new_tokens)
        require("overlong_buffer", 0 <= overlong_buffer <= max_new_tokens, f"0 to {max_new_tokens=}", overlong_buffer)
        require_divides("group_size", group_size, "rollout_batch_size", rollout_batch_size)
        require_divides("minibatch_size", minibatch_size, self.learned_from, self.learned_rows)
        if minibatch_size % self.rows_together:
            raise ValueError(f"`minibatch_size` must be a multiple of {self.rows_together}, but got {minibatch_size}.")
        terms = [] if reward is None else reward_terms(reward, self.hparams.dtype, forward_batch_size)
        self.rewards = WeightedRewards(terms, reward_weights, normalize_rewards)
        self.policy: nn.Module | None = None
        self.samples: dict[str, list] = {}
        """The last rollout as columns: prompt, response, reward, kl, length, ended, reward/<name>."""
        self.score_moments = [0.0, 0.0, 0.0]  # count, sum, sum of squares of all scores so far
        self._experience: ExperienceDataset | None = None
        self._resumed: NamedTuple | None = None  # of a checkpoint from within an iteration
        self._prompts: Any = None

    learned_from = "rollout_batch_size"  # how messages call the next

    @property
    def learned_rows(self) -> int:
        """Sequences on each process that an iteration learns from."""
        return self.hparams.rollout_batch_size

    # --- building -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check what can be checked before a model is loaded."""
        super().setup(stage)
        hparams, accumulate = self.hparams, self.trainer.accumulate_grad_batches
        if stage != "predict" and not self.rewards.terms:
            raise ValueError(
                "`reward` is required to fit, validate or test: a reward model, a dotted path of a function, or a list."
            )
        minibatches = self.learned_rows // hparams.minibatch_size
        if stage == "fit" and minibatches % accumulate:
            raise ValueError(
                f"`accumulate_grad_batches` must divide the minibatches of one pass: {self.learned_from} / "
                f"minibatch_size = {self.learned_rows} / {hparams.minibatch_size} = {minibatches}, and "
                f"{minibatches} / {accumulate} = {minibatches / accumulate:g}."
            )

    def build(self) -> list[nn.Module]:
        """Load the policy and its frozen reference."""
        networks, spec = super().build(), self.hparams.reference
        other = spec and load_causal_lm(spec, self.backbone_dtype, self.hparams.trust_remote_code)
        self.reference = FrozenReference(self.policy, other)
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
        rows = self.learned_rows * self.trainer.world_size
        self._experience = self._experience or ExperienceDataset(rows, self.rows_together)
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

    def sample_and_score(self, again: int = 0) -> Samples:
        """Responses to the next prompts, G to each, and their rewards.

        Args:
            again: how many times in this iteration it was done before, for other noise.
        """
        h = self.hparams
        prompts = repeated(self._prompts.take(h.rollout_batch_size // h.group_size), h.group_size)
        prompts = self.trainer.strategy.batch_to_device(prompts)
        stream = [self.current_epoch, again] if again else [self.current_epoch]
        rollout = self.roll_out(prompts, self.own_rows(), *stream)
        return self.score(rollout, prompts)

    def roll_out(self, prompts: dict[str, Any], rows: Sequence[int], *stream: int) -> Rollout:
        """Sample one response per prompt. The noise depends on seed, stream and row number, and on no other state."""
        noise = row_noise(rows, self.hparams.max_new_tokens, self.seed, *stream).to(self.device)
        ids, mask = prompts["input_ids"], prompts["attention_mask"]
        with self.sampler() as network:
            return sample(network, ids, mask, self.sampling, noise, self.any_rank)

    @contextmanager
    def sampler(self) -> Iterator[nn.Module]:
        """The network that responses are sampled from."""
        yield self.policy

    def own_rows(self) -> range:
        """Numbers of this rank's responses among those of all ranks in an iteration."""
        size = self.hparams.rollout_batch_size
        return range(self.global_rank * size, (self.global_rank + 1) * size)

    def score(self, rollout: Rollout, prompts: dict[str, Any]) -> Samples:
        """Responses as text, and their rewards."""
        responses, columns = texts(rollout, self.tokenizer), prompts.get("columns", {})
        ids = [row[mask].tolist() for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
        given = Responses(prompts["prompts"], responses, columns, ids, self.tokenizer)
        reduce = self._sum_on_cpu if self.trainer.training else None
        scores = self.rewards.to(self.device, self.mesh, shared_base(self))(given, reduce=reduce)
        return Samples(given.prompts, responses, rollout, on_device(scores, rollout.response_mask))

    def _sum_on_cpu(self, values: Tensor) -> Tensor:
        return self.sum_over_ranks(values.to(self.device)).cpu()

    def shaped_scores(self, scores: Tensor, rollout: Rollout) -> Tensor:
        """Scores (B,) after normalisation, clipping and the penalties for missing EOS and length, in this order."""
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
        if hparams.overlong_buffer:
            lengths = rollout.response_mask.sum(1)
            scores = scores - soft_overlong_penalty(lengths, hparams.max_new_tokens, hparams.overlong_buffer)
        return penalize_missing_eos(scores, rollout.ended, hparams.missing_eos_penalty)

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

    def response_outputs(self, model: nn.Module, e: Experience | Rollout) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) that were sampled from, and hidden states (B, T + 1, H), of a Rollout or an Experience."""
        logits, hidden = response_outputs(model, *whole_sequences(e), e.response_ids.shape[1])
        return self.sampling.constrain(logits), hidden

    def logprobs(self, logits: Tensor, e: Experience | Rollout) -> Tensor:
        """(B, T) log-probabilities of the response tokens, at the sampling temperature."""
        return token_logprobs(logits, e.response_ids, self.hparams.temperature)

    def values(self, e: Experience | Rollout, hidden: Tensor) -> Tensor:
        """(B, T + 1) values before each response token and after the last; methods without a value model have 0."""
        return torch.zeros(hidden.shape[:2], device=hidden.device)

    def fill(self, experience: NamedTuple) -> None:
        """Give the epoch's batches their content: the experience of all ranks."""
        self._experience.experience = of_all_ranks(experience)

    # --- what is seen ---------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """An iteration that a stopped run began goes on with its experience, and is timed from here."""
        super().on_train_start()
        self._experience.experience, self._resumed = self._resumed, None
        self._start = self._update_start = self._update_end = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: NamedTuple, batch_idx: int) -> None:
        """The update ends with the last batch; validation may follow before the epoch ends."""
        self._update_end = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        """Time and throughput of the iteration, validation left out."""
        tokens = float(sum(self.samples.get("length", [])))  # none on other ranks that resumed within the iteration
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
            samples = self.score(self.roll_out(batch, self.next_rows(len(batch["prompts"])), -1), batch)
            return report(self, stage, samples, self.token_statistics(samples.rollout))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list]:
        """Sampled responses, with their rewards if `reward` is given."""
        with self.rollout_weights():
            rollout = self.roll_out(batch, self.next_rows(len(batch["prompts"])), -2)
        if not self.rewards.terms:
            return {"prompt": batch["prompts"], "response": texts(rollout, self.tokenizer)}
        samples = self.score(rollout, batch)
        return {"prompt": samples.prompts, "response": samples.responses, "reward": samples.scores.total.tolist()}

    # --- checkpoints and export -----------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The score moments go along; within an iteration its experience, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["on_policy"] = {"score_moments": self.score_moments, "rewards": self.rewards.state_dict()}
        if self.is_within_epoch():
            experience = [field.cpu() for field in self._experience.experience]
            checkpoint["on_policy"] |= {"experience": experience, "samples": self.samples}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The score moments and an iteration's experience come back."""
        super().on_load_checkpoint(checkpoint)
        self.score_moments = checkpoint["on_policy"]["score_moments"]
        self.rewards.load_state_dict(checkpoint["on_policy"]["rewards"])
        if fields := checkpoint["on_policy"].get("experience"):
            self._resumed = self.experience_type(*(field.to(self.device) for field in fields))
            self.samples = checkpoint["on_policy"]["samples"] if self.global_rank == 0 else {}


def on_device(scores: Scores, mask: Tensor) -> Scores:
    """Scores where the mask (B, T) is, `per_token` as wide as that."""
    per_token = scores.per_token
    if per_token is not None:
        per_token = nn.functional.pad(per_token, (0, mask.shape[1] - per_token.shape[1])).to(mask.device)
    components = {name: values.to(mask.device) for name, values in scores.components.items()}
    return Scores(scores.total.to(mask.device), components, per_token)


def whole_sequences(e: Experience | Rollout) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of prompt + response, both (B, P + T)."""
    ids = torch.cat([e.prompt_ids, e.response_ids], dim=1)
    return ids, torch.cat([e.prompt_mask, e.response_mask], dim=1).long()
