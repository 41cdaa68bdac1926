"""What all modules share that sample from a policy: responses, their rewards, their log-probabilities, evaluation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..functional import penalize_missing_eos, soft_overlong_penalty
from .backbone import load_causal_lm, unwrapped
from .checks import require
from .compiled_decoding import CompiledDecoding, can_be_compiled
from .decoding import Decoding
from .engines import RolloutEngine
from .experience import Experience, TokenStatistics
from .packed_weights import packed_weights
from .reading import read
from .reference import FrozenReference
from .reporting import Seen, figures_of_all, report, seen
from .rollout import Rollout, Sampling, row_noise, sample, texts, trimmed
from .samples import Samples
from .scoring import Responses, Scores, WeightedRewards, reward_terms
from .sharding import num_chunks
from .sharing import shared_base
from .text_module import TextModule

Reward = str | dict | list[str | dict | Callable | nn.Module] | Callable | nn.Module
Sampler = Callable[[], AbstractContextManager[nn.Module]]


class ResponseReading(NamedTuple):
    """What a causal LM says of sampled responses."""

    logprobs: Tensor
    """(B, T) float32, at the sampling temperature; 0 outside the mask."""
    entropy: Tensor | None
    """(B, T) float32 likewise; None if it was not asked for."""
    hidden: Tensor
    """(B, T + 1, H) last hidden states before each response token, and if asked for after the last."""


class RolloutModule(TextModule):
    """Base of what samples from a policy and scores the responses: validate, test, predict.

    Args:
        model: the policy.
        reward: what to maximise: a reward model (folder, hub id, `.ckpt` of a RewardModule), the dotted path of a
            Python function `f(prompts, responses, **columns) -> list of floats`, the URL of a service, a class with
            `class_path` and `init_args`, or a list of these; see docs/rewards.md.
        reward_weights: one weight per reward, 1 each by default. Weight 0 logs a reward without training on it.
        reference: the policy to stay close to, and to which KL is measured, a folder or hub id; None is the starting
            policy itself: with LoRA the adapter switched off, else a frozen copy.
        max_new_tokens: longest response, in tokens.
        min_new_tokens: no EOS before this many tokens. It is part of the policy: log-probabilities know it.
        temperature: of sampling; log-probabilities of policy and reference are taken at the same temperature.
        score_clip: scores are cut to ± this; None does not cut.
        missing_eos_penalty: subtracted from the score of a response that hit the length limit.
        overlong_buffer: over so many tokens before the length limit, a penalty from 0 to 1 is subtracted from the score
            (DAPO); 0 is off.
        forward_batch_size: most sequences in one scoring pass (policy, reference, reward model); sampling takes all at
            once.
        rollout_engine: what samples responses in the place of this project's own loop, such as `VLLMEngine`; None is
            that loop.
        packed_weights: in a rollout on a CPU, use a copy of the weights of 16 bits that is laid out for few rows; it
            changes the speed alone, and takes as much memory as the weights.
        compact_rollouts: read a prompt once for all its responses, and let go of responses that have ended while the
            others go on. It changes the speed alone.
        compiled_rollouts: sample by a program that `torch.compile` makes, on a GPU as a CUDA graph, all rows to the
            end. It compiles when it is first used; meant for GPUs.
        **kwargs: see `TextModule`.
    """

    exported = "policy"
    has_values = False  # then nobody asks for the hidden state after the last token

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward: Reward | None = None,
        *,
        reward_weights: list[float] | None = None,
        reference: str | None = None,
        max_new_tokens: int = 64,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        score_clip: float | None = None,
        missing_eos_penalty: float = 0.0,
        overlong_buffer: int = 0,
        forward_batch_size: int = 32,
        rollout_engine: RolloutEngine | None = None,
        compact_rollouts: bool = True,
        packed_weights: bool = True,
        compiled_rollouts: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        require("reference", isinstance(reference, str | None), "a folder or hub id", type(reference).__name__)
        require("temperature", temperature > 0, "above 0", temperature)
        require("min_new_tokens", 0 <= min_new_tokens <= max_new_tokens, f"0 to {max_new_tokens=}", min_new_tokens)
        require("overlong_buffer", 0 <= overlong_buffer <= max_new_tokens, f"0 to {max_new_tokens=}", overlong_buffer)
        self.engine, h = rollout_engine, self.hparams
        terms = [] if reward is None else reward_terms(reward, h.dtype, forward_batch_size, h.padding_free)
        self.rewards = WeightedRewards(terms, reward_weights)
        self.policy: nn.Module | None = None
        self._seen: list[Seen] = []  # in this evaluation
        self._of_reference: dict[tuple[str, int, int], tuple[str, float]] = {}

    # --- building -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check what can be checked before a model is loaded."""
        super().setup(stage)
        if stage != "predict" and not self.rewards.terms:
            raise ValueError(
                "`reward` is required to fit, validate or test: a reward model, a dotted path of a function, or a list."
            )
        if self.engine is not None:  # it is given whole weights
            require("load_in_4bit", not self.hparams.load_in_4bit, "false with `rollout_engine`", True)
            is_whole = self.mesh is None or self._unshards_rollouts
            require("--trainer.strategy.unshard_rollouts", is_whole, "true with `rollout_engine`", False)
        if self.hparams.compiled_rollouts:
            require("compiled_rollouts", self.engine is None, "false with `rollout_engine`", True)
            require("compiled_rollouts", self.mesh is None, "false under `--trainer.strategy fsdp2`", True)

    def build(self) -> list[nn.Module]:
        """Load the policy and its frozen reference."""
        networks, spec = super().build(), self.hparams.reference
        other = spec and load_causal_lm(spec, self.backbone_dtype, self.hparams.trust_remote_code)
        self.reference = FrozenReference(self.policy, other)
        if self.hparams.compiled_rollouts and not can_be_compiled(self.policy):
            kind = type(unwrapped(self.policy)).__name__
            raise ValueError(f"`compiled_rollouts` must be false for a {kind}, which is not known to allow it.")
        return networks if self.reference.copy is None else [*networks, self.reference.copy]

    @property
    def sampling(self) -> Sampling:
        """How responses are sampled."""
        h = self.hparams
        return Sampling.of(
            self.policy, self.tokenizer, h.max_new_tokens, min_new_tokens=h.min_new_tokens, temperature=h.temperature
        )

    # --- responses, rewards, log-probabilities ---------------------------------------------------------------------

    def roll_out(
        self, prompts: dict[str, Any], rows: Sequence[int], *stream: int, sampler: Sampler | None = None
    ) -> Rollout:
        """Sample one response per prompt. The noise depends on seed, stream and row number, and on no other state."""
        noise = row_noise(rows, self.hparams.max_new_tokens, self.seed, *stream).to(self.device)
        ids, mask = prompts["input_ids"], prompts["attention_mask"]
        with (sampler or self.sampler)() as network:
            if self.engine is not None:
                seeds = (noise[:, 0] * 2**31).long().tolist()
                return self.engine.sample(network, ids, mask, self.sampling, seeds)
            h, how = self.hparams, CompiledDecoding if self.hparams.compiled_rollouts else Decoding
            # A compiled program takes the weights as they are.
            with packed_weights(network, len(ids)) if h.packed_weights and how is Decoding else nullcontext():
                return sample(network, ids, mask, self.sampling, noise, self.any_rank, h.compact_rollouts, how)

    @contextmanager
    def sampler(self) -> Iterator[nn.Module]:
        """The network that responses are sampled from."""
        yield self.policy

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
        """Scores (B,) after clipping and the penalties for length and missing EOS."""
        hparams = self.hparams
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
        said = self.read(self.policy, chunk, with_entropy=True, to_the_end=self.has_values)
        values = self.values(chunk, said.hidden)  # (B, T + 1)
        value_after = values.gather(1, chunk.response_mask.sum(1, keepdim=True)).squeeze(1)
        with self.reference() as reference:
            ref_logprobs = self.read(reference, chunk).logprobs
        return TokenStatistics(said.logprobs, ref_logprobs, said.entropy, values[:, :-1], value_after)

    def read(
        self, network: nn.Module, e: Experience | Rollout, with_entropy: bool = False, to_the_end: bool = False
    ) -> ResponseReading:
        """What a network says of the responses of a Rollout or an Experience, as the distribution they are from.

        Args:
            network: a causal LM.
            e: the responses.
            with_entropy: whether entropies are asked for.
            to_the_end: whether the hidden state after the last token is asked for.
        """
        ids, attention_mask = whole_sequences(e)
        width, mask = e.prompt_ids.shape[1], e.response_mask
        where = torch.cat([torch.zeros_like(e.prompt_mask), mask], dim=1)
        also = where if to_the_end else None
        said = read(network, ids, attention_mask, where, self.sampling.of_tokens(mask), with_entropy, hidden_at=also)
        logprobs, entropies = (
            None if flat is None else torch.zeros_like(mask, dtype=flat.dtype).masked_scatter(mask, flat)
            for flat in (said.logprobs, said.entropy)
        )
        return ResponseReading(logprobs, entropies, said.hidden[:, width - 1 :])

    def values(self, e: Experience | Rollout, hidden: Tensor) -> Tensor:
        """(B, T + 1) values before each response token and after the last; 0 without a value model.

        A subclass that computes some sets `has_values`.
        """
        return torch.zeros(hidden.shape[:2], device=hidden.device)

    # --- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list]:
        """Sample on held-out prompts; the same noise meets the same prompts at every evaluation."""
        return self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list]:
        """Sample on test prompts."""
        return self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: dict[str, Any], batch_idx: int, stage: str) -> dict[str, list]:
        rows = self.next_rows(len(batch["prompts"]))
        others = self.reference_samples(batch, rows, stage)
        with self.rollout_weights():
            samples = self.score(self.roll_out(batch, rows, -1), batch)
            columns = report(self, stage, samples, self.token_statistics(samples.rollout))
        self._seen.append(seen(samples, others["reference_reward"]))
        return columns | others

    def reference_samples(self, batch: dict[str, Any], rows: Sequence[int], stage: str) -> dict[str, list]:
        """What the reference answers to the same prompts with the same noise, sampled once, and its rewards."""
        keys = [(stage, row, self.reference.refreshes) for row in rows]
        if self.rewards.normalize or not all(key in self._of_reference for key in keys):
            with self.rollout_weights(self.reference.copy or self.policy):
                samples = self.score(self.roll_out(batch, rows, -1, sampler=self.reference), batch)
            found = zip(samples.responses, samples.scores.total.tolist(), strict=True)
            self._of_reference |= dict(zip(keys, found, strict=True))
        responses, rewards = zip(*(self._of_reference[key] for key in keys), strict=True)
        return {"reference_response": list(responses), "reference_reward": list(rewards)}

    def on_validation_epoch_end(self) -> None:
        """Figures of all held-out responses together."""
        self._log_seen("val")

    def on_test_epoch_end(self) -> None:
        """The same of a test."""
        self._log_seen("test")

    def _log_seen(self, stage: str) -> None:
        for name, value in figures_of_all(self._seen).items():
            self.log(f"{stage}/{name}", value, sync_dist=True)  # equal on all ranks
        self._seen = []

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list]:
        """Sampled responses, with their rewards if `reward` is given."""
        with self.rollout_weights():
            rollout = self.roll_out(batch, self.next_rows(len(batch["prompts"])), -2)
        if not self.rewards.terms:
            return {"prompt": batch["prompts"], "response": texts(rollout, self.tokenizer)}
        samples = self.score(rollout, batch)
        return {"prompt": samples.prompts, "response": samples.responses, "reward": samples.scores.total.tolist()}


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
