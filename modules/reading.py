"""What a causal language model says of tokens: log-probabilities, entropies, hidden states, in one forward pass.

The plain way is to pass padded sequences, take the logits at the tokens that count, and their log-softmax. Two faster
ways compute the same, and are on by default where a model is known to allow them (`padding_free.VERIFIED`):

- padding-free: sequences in one row, each cut off behind the last token that is asked for, see `padding_free.py`;
- fused log-probs: from hidden states to log-probabilities without float32 logits, see `linear_logprobs`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..functional import SampledFrom, entropy, linear_logprobs, position_ids, token_logprobs
from .backbone import unwrapped
from .compiled_layers import compile_layers
from .fused_layers import fuse_layers
from .padding_free import ATTENTION, Packing, Places, can_be_padding_free, collect, packed_inputs, spread
from .tied_embedding import is_tied, tied_embedding


class FastPaths(NamedTuple):
    """In which of the faster ways a network is read."""

    padding_free: bool = False
    fused_logprobs: bool = False


def set_fast_paths(
    network: nn.Module, padding_free: bool, fused_logprobs: bool, fused_layers: bool, compiled_layers: bool = False
) -> None:
    """Let a network be read in the faster ways that are switched on, as far as it is known to allow them."""
    bare = unwrapped(getattr(network, "model", network) if hasattr(network, "called_modules") else network)
    if not isinstance(bare, PreTrainedModel):
        return
    known = can_be_padding_free(bare)
    if known and padding_free:
        bare.set_attn_implementation(ATTENTION)
    if compiled_layers:
        compile_layers(bare)
    elif fused_layers:
        fuse_layers(bare)
    head = bare.get_output_embeddings() if known else None
    is_plain = type(head) is nn.Linear and head.bias is None
    bare.fast_paths = FastPaths(known and padding_free, is_plain and fused_logprobs)


def fast_paths(model: nn.Module) -> FastPaths:
    """In which of the faster ways a network is read: in none, unless `set_fast_paths` said so."""
    return getattr(unwrapped(model), "fast_paths", FastPaths())


class Passage(NamedTuple):
    """How a batch goes through a network."""

    inputs: dict[str, Any]
    """Arguments of its forward."""
    places: Places | None
    """Where in (B, L) the tokens of the row are from; None if they are as they were, padded."""
    shape: torch.Size
    """B, L."""

    @classmethod
    def of(cls, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, asked: Tensor) -> "Passage":
        """Of a batch (B, L), padded anywhere; hidden states are asked for where `asked` (B, L) is True."""
        positions = position_ids(attention_mask)
        if not fast_paths(model).padding_free:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
            return cls(inputs | {"use_cache": False}, None, input_ids.shape)
        still_asked = asked.flip(1).cumsum(1).flip(1) > 0
        kept = attention_mask.bool() & still_asked
        if not kept.any():
            kept = attention_mask.bool()  # a batch without a single target still makes a pass, of all ranks maybe
        packing = Packing.of(kept, input_ids)
        inputs = packed_inputs(packing, input_ids, positions)
        return cls(inputs | {"use_cache": False}, packing.places, input_ids.shape)

    def rows(self, hidden: Tensor, where: Tensor) -> Tensor:
        """(N, H) hidden states at the N places where `where` (B, L) is True, row by row."""
        return collect(self.padded(hidden).flatten(0, 1), where.flatten().nonzero().squeeze(1))

    def padded(self, hidden: Tensor) -> Tensor:
        """(B, L, ...) hidden states, or what was made of them, where the batch had its tokens."""
        if self.places is None:
            return hidden
        return spread(hidden[0], self.places).view(*self.shape, *hidden.shape[2:])


class Reading(NamedTuple):
    """What a causal LM says of N tokens, row by row."""

    logprobs: Tensor
    """(N,) float32."""
    entropy: Tensor | None
    """(N,) float32, of the distributions that they are from; None if it was not asked for."""
    hidden: Tensor
    """(B, L, H), the last hidden state of each token up to the last that was asked for; beyond it is no meaning."""


def read(
    model: PreTrainedModel | PeftModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    where: Tensor,
    sampled_from: SampledFrom | None = None,
    with_entropy: bool = False,
    hidden_at: Tensor | None = None,
) -> Reading:
    """Log-probabilities of some tokens, in one forward pass.

    Args:
        model: a causal LM with the Hugging Face forward signature.
        input_ids: (B, L).
        attention_mask: (B, L), padded on either side.
        where: (B, L) bool, the N tokens that are asked for; none of them is a sequence's first.
        sampled_from: temperature and forbidden tokens; None is temperature 1 and nothing forbidden.
        with_entropy: whether entropies are asked for.
        hidden_at: (B, L) bool, where hidden states are asked for; None needs none.
    """
    before = pad(where[:, 1:], (0, 1))  # the position before a token predicts it
    passage = Passage.of(model, input_ids, attention_mask, before if hidden_at is None else before | hidden_at)
    tokens = input_ids[where]
    sampled_from = SampledFrom() if sampled_from is None else sampled_from
    embed, head = unwrapped(model).get_input_embeddings(), unwrapped(model).get_output_embeddings()
    seen, weights = [], []
    places = before.flatten().nonzero().squeeze(1)
    is_fused = fast_paths(model).fused_logprobs

    def forward(hidden: Tensor) -> Tensor:
        seen.append(passage.padded(hidden))
        rows = collect(seen[0].flatten(0, 1), places)
        if not is_fused:
            return type(head).forward(head, rows[None])
        weight = weights[0] if weights else head.weight
        return torch.stack(linear_logprobs(rows, weight, tokens, sampled_from, with_entropy), dim=-1)[None]

    embedding = _calls(embed, tied_embedding(embed, weights.append)) if is_fused and is_tied(embed, head) else None
    # The model hands on what its head returns as its logits. It is called as a whole, as sharding wants it.
    with _calls(head, forward), embedding or nullcontext():
        out = model(**passage.inputs).logits[0]
    if is_fused:
        logprobs, entropies = out.unbind(-1)
    else:
        logits = sampled_from.constrain(out)
        logprobs = token_logprobs(logits, tokens, sampled_from.temperature)
        entropies = entropy(logits, sampled_from.temperature) if with_entropy else None
    return Reading(logprobs, entropies if with_entropy else None, seen[0])


def logits_at(model: PreTrainedModel | PeftModel, input_ids: Tensor, attention_mask: Tensor, where: Tensor) -> Tensor:
    """(N, V) logits at the N positions where `where` (B, L) is True, and nowhere else.

    The vocabulary makes logits the largest tensor by far. Only the language-model head sees the selection, so whatever
    a model does to its logits afterwards (soft caps, scales) is still done.
    """
    passage = Passage.of(model, input_ids, attention_mask, where)
    head = unwrapped(model).get_output_embeddings()
    with _calls(head, lambda hidden: type(head).forward(head, passage.rows(hidden, where)[None])):
        return model(**passage.inputs).logits[0]


@contextmanager
def _calls(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context the module does something else when it is called."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
