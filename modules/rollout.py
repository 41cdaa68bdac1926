"""Sampling responses: plain ancestral sampling with a key-value cache.

Nothing but the temperature and the EOS rule stands between the logits and the sample, so the log-probabilities of the
update are those that were sampled from. (`generate` fills every option that is not given from the model's own
generation config: a top-p or repetition penalty slips in that way, and KL goes negative.)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from ..functional import forbid_tokens, position_ids, response_mask
from ..loaders import generator_for


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

    def constrain(self, logits: Tensor) -> Tensor:
        """Logits (B, T, V) of the policy that is really sampled from: no EOS before `min_new_tokens`."""
        return forbid_tokens(logits, self.eos_token_ids, self.min_new_tokens) if self.min_new_tokens else logits


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
    """
    if not isinstance(noise, Tensor):
        shape, device = (len(prompt_ids), sampling.max_new_tokens), prompt_ids.device
        noise = torch.rand(shape, dtype=torch.float64, device=device, generator=noise)
    was_training = model.training
    model.eval()  # gradient checkpointing would switch the cache off
    mask, tokens = prompt_mask.long(), prompt_ids
    position = position_ids(mask)
    running = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    cache, response = None, []
    for step in range(sampling.max_new_tokens):
        out = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        drawn = _draw(out.logits[:, -1:], step, sampling, noise[:, step : step + 1])  # (B, 1)
        tokens = drawn.where(running[:, None], sampling.pad_token_id)
        response.append(tokens)
        running = running & ~torch.isin(drawn[:, 0], torch.tensor(sampling.eos_token_ids, device=drawn.device))
        if not (running.any() if any_rank is None else any_rank(running.any())):
            break
        mask = torch.cat([mask, torch.ones_like(drawn)], dim=1)
        position = position[:, -1:] + 1
    model.train(was_training)
    missing = sampling.max_new_tokens - len(response)
    response_ids = pad(torch.cat(response, dim=1), (0, missing), value=sampling.pad_token_id)  # (B, T)
    counts = response_mask(response_ids, sampling.eos_token_ids)
    return Rollout(prompt_ids, prompt_mask.bool(), response_ids, counts, ~running)


def row_noise(rows: Sequence[int], tokens: int, seed: int, *stream: int) -> Tensor:
    """(B, tokens) uniform numbers that depend on seed, stream and the row's own number.

    With rows numbered over all ranks, a prompt meets the same noise however many ranks share the work.
    """
    generators = [generator_for(seed, 1, *stream, row) for row in rows]  # 1: other numbers than those of a shuffle
    return torch.stack([torch.rand(tokens, dtype=torch.float64, generator=generator) for generator in generators])


def _draw(logits: Tensor, step: int, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Response token number `step`, (B, 1), from logits (B, 1, V), by inverting the cumulative distribution.

    One random number per sequence instead of the one per vocabulary entry that `torch.multinomial` draws. A token of
    probability 0 has no interval of its own, so it never comes.
    """
    logits = forbid_tokens(logits.float(), sampling.eos_token_ids, sampling.min_new_tokens - step)
    cumulative = (logits[:, 0] / sampling.temperature).softmax(-1).double().cumsum(-1)  # (B, V)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


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
