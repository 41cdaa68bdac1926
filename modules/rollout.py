"""Sampling responses: plain ancestral sampling with a key-value cache.

Nothing but the temperature and the EOS rule stands between the logits and the sample, so the log-probabilities of the
update are those that were sampled from. (`generate` fills every option that is not given from the model's own
generation config: a top-p or repetition penalty slips in that way, and KL goes negative.)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..functional import SampledFrom, invert_cdf, response_mask
from ..loaders import generator_for
from .decoding import Decoding


class Sampling(NamedTuple):
    """How responses are sampled, and therefore which distribution log-probabilities refer to."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    min_new_tokens: int = 0
    temperature: float = 1.0

    @classmethod
    def of(
        cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, **kwargs: float
    ) -> "Sampling":
        """With the EOS ids that the model's generation config and the tokenizer name."""
        config = getattr(model, "generation_config", None)
        ids = getattr(config, "eos_token_id", None)
        ids = ids if isinstance(ids, Sequence) else [ids]
        eos = sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
        return cls(max_new_tokens, tuple(eos), tokenizer.pad_token_id, **kwargs)

    def of_tokens(self, mask: Tensor) -> SampledFrom:
        """The distribution that the response tokens of a mask (B, T) are from, row by row: it has no early EOS."""
        if not self.min_new_tokens:
            return SampledFrom(self.temperature)
        is_early = torch.arange(mask.shape[1], device=mask.device) < self.min_new_tokens
        return SampledFrom(self.temperature, self.eos_token_ids, is_early.expand_as(mask)[mask])

    def of_step(self, step: int, rows: int, device: torch.device) -> SampledFrom:
        """The distribution that response token number `step` of so many rows is from."""
        if step >= self.min_new_tokens:
            return SampledFrom(self.temperature)
        return SampledFrom(self.temperature, self.eos_token_ids, torch.ones(rows, dtype=torch.bool, device=device))


class Rollout(NamedTuple):
    """Prompts and sampled responses."""

    prompt_ids: Tensor
    """(B, P), left-padded."""
    prompt_mask: Tensor
    """(B, P) bool."""
    response_ids: Tensor
    """(B, T), right-padded with the pad id."""
    response_mask: Tensor
    """(B, T) bool, True up to the EOS, inclusive."""
    ended: Tensor
    """(B,) bool, whether there is an EOS."""
    sampled_logprobs: Tensor
    """(B, T) float32, log-probability of each token as whatever sampled it had it; 0 outside the mask."""


Columns = TypeVar("Columns", bound=NamedTuple)


def trimmed(rows: Columns) -> Columns:
    """The same sequences (a Rollout or an Experience) without the columns in which no sequence has a token."""
    start = int(rows.prompt_mask.any(0).float().argmax())
    stop = int(rows.response_mask.any(0).sum())
    fields = rows._asdict()
    for name, value in fields.items():
        if name.startswith("prompt"):
            fields[name] = value[:, start:]
        elif value.ndim == 2:
            fields[name] = value[:, :stop]
    return type(rows)(**fields)


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    sampling: Sampling,
    noise: Tensor | torch.Generator | None = None,
    any_rank: Callable[[Tensor], Tensor] | None = None,
    compact: bool = True,
    decoding: type[Decoding] = Decoding,
) -> Rollout:
    """Sample one response per prompt from softmax(logits / temperature).

    Args:
        model: a causal LM with the Hugging Face forward signature.
        prompt_ids: (B, P), left-padded.
        prompt_mask: (B, P), True at prompt tokens.
        sampling: lengths, temperature, EOS.
        noise: (B, max_new_tokens) uniform numbers in [0, 1), see `row_noise`; or a generator that draws them; None is
            torch's global one.
        any_rank: tells whether a flag is True on any rank. Needed where a forward pass takes all ranks (sharded
            weights): the last to finish then decides. None decides alone.
        compact: read a prompt that stands in several rows once, and let go of rows that have ended.
        decoding: how the tokens go through the model.
    """
    shape, device = (len(prompt_ids), sampling.max_new_tokens), prompt_ids.device
    if not isinstance(noise, Tensor):
        noise = torch.rand(shape, dtype=torch.float64, device=device, generator=noise)
    was_training = model.training
    model.eval()  # gradient checkpointing would switch the cache off
    response_ids = torch.full(shape, sampling.pad_token_id, device=device)
    logprobs = torch.zeros(shape, device=device)
    running = torch.ones(shape[:1], dtype=torch.bool, device=device)
    eos = torch.tensor(sampling.eos_token_ids, device=device)
    batch = decoding.start(model, prompt_ids, prompt_mask.long(), sampling.max_new_tokens, compact)
    for step in range(sampling.max_new_tokens):
        drawn, said = _draw(batch.logits, step, sampling, noise[batch.rows, step : step + 1])  # (rows, 1) each
        tokens = drawn.where(running[batch.rows, None], sampling.pad_token_id)
        response_ids[batch.rows, step], logprobs[batch.rows, step] = tokens[:, 0], said[:, 0]
        running[batch.rows] &= ~torch.isin(drawn[:, 0], eos)
        if step + 1 == sampling.max_new_tokens:
            break
        if (step + 1) % decoding.LOOKS == 0:
            others_run = any_rank is not None and any_rank(running.any())
            if not (running.any() or others_run):
                break
        batch.step(tokens, running[batch.rows])
    model.train(was_training)
    counts = response_mask(response_ids, sampling.eos_token_ids)
    return Rollout(prompt_ids, prompt_mask.bool(), response_ids, counts, ~running, logprobs.masked_fill(~counts, 0.0))


def row_noise(rows: Sequence[int], tokens: int, seed: int, *stream: int) -> Tensor:
    """(B, tokens) uniform numbers that depend on seed, stream and the row's own number.

    With rows numbered over all ranks, a prompt meets the same noise however many ranks share the work.
    """
    generators = [generator_for(seed, 1, *stream, row) for row in rows]  # 1: other numbers than those of a shuffle
    return torch.stack([torch.rand(tokens, dtype=torch.float64, generator=generator) for generator in generators])


def _draw(logits: Tensor, step: int, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Response token number `step` from logits (B, 1, V), and its log-probability, (B, 1) each.

    One random number per sequence, instead of one per entry of the vocabulary as `torch.multinomial` draws.
    """
    sampled_from = sampling.of_step(step, len(logits), logits.device)
    probabilities = sampled_from.scaled(logits[:, 0], slice(None)).softmax(-1)  # (B, V)
    tokens = invert_cdf(probabilities, uniform)
    return tokens, probabilities.gather(1, tokens).log()


def texts(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The responses as text, without the EOS.

    Prompt and response are decoded together and the prompt is taken off: some tokenizers drop the space at the start
    of what they decode.
    """
    prompts, wholes = [], []
    starts = rollout.prompt_ids.shape[1] - rollout.prompt_mask.sum(1)
    lengths = rollout.response_mask.sum(1) - rollout.ended.long()
    columns = (rollout.prompt_ids, starts, rollout.response_ids, lengths)
    for prompt, start, response, length in zip(*(column.tolist() for column in columns), strict=True):
        ids = prompt[start:]
        prompts.append(tokenizer.decode(ids))
        wholes.append(tokenizer.decode(ids + response[:length]))
    return [whole.removeprefix(prompt) for whole, prompt in zip(wholes, prompts, strict=True)]
