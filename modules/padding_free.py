"""Sequences one after the other in one row, without padding, for models whose only mixing of tokens is attention.

A model takes them as one sequence of S tokens whose positions start anew. Attention alone must know where a sequence
ends: it is told by a keyword that transformers hands through to the attention function, which is ours. That puts
sequences of like length side by side again, padded on the right, where causal attention needs no mask. So padding costs
attention only, and there not much; linear layers, norms and activations see none of it.

What sequences of like length have in common at their begin (the prompt of a group's responses or of a pair, a system
prompt) lies in the row once: a causal model says the same of it every time, and its gradients are added up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .short_attention import is_short, is_step, short_attention, step_attention

ATTENTION = "padding_free_sdpa"
VERIFIED = {"gemma", "glm", "gpt2", "gpt_neox", "helium", "llama", "mistral", "olmo", "olmo2", "phi", "phi3", "qwen2"}
VERIFIED |= {"qwen3", "smollm3", "starcoder2"}
"""Model types of which the tests hold this way of reading to the plain one."""


SMALLEST = 32
"""On a CPU sequences of up to so many tokens lie side by side in attention; longer ones do with those of like length,
up to 45 tokens, 64, 90, 128 and so on, each step √2. So how a sequence is computed depends on its own length alone."""


WORTH = 1 / 32
"""Share of the tokens from which on it pays that what sequences begin with lies in a row once."""


class Places(NamedTuple):
    """Which token of a row stands in which cell of a grid; a token may stand in several, of the same column."""

    source: Tensor
    """(cells,) number of the token of each; any for those of `empty`."""
    first: Tensor
    """(tokens,) number of the cell that is each one's own."""
    empty: Tensor
    """Numbers of the cells without a token."""
    again: Tensor
    """Numbers of the other cells with a token;"""
    shared: Tensor
    """the tokens that stand in these, each once;"""
    which: Tensor
    """and of each of these the place of its token in `shared`."""

    @classmethod
    def of(cls, source: Tensor, first: Tensor, again: Tensor, device: torch.device) -> "Places":
        """Of tensors on the CPU."""
        empty = torch.ones_like(source, dtype=torch.bool)
        empty[first] = empty[again] = False
        shared, which = source[again].unique(return_inverse=True)
        return cls(*(x.to(device) for x in (source, first, empty.nonzero().squeeze(1), again, shared, which)))


class Group(NamedTuple):
    """Sequences next to each other in a row of tokens."""

    tokens: int
    places: Places | None
    """In the padded (B, L); None if no sequence is shorter than another, and none begins like another."""
    shape: tuple[int, int]
    """B, L."""

    def side_by_side(self, packed: Tensor) -> Tensor:
        """(tokens, ...) -> (B, L, ...), zeros behind the ends."""
        whole = packed if self.places is None else spread(packed, self.places)
        return whole.view(*self.shape, *packed.shape[1:])

    def in_a_row(self, padded: Tensor) -> Tensor:
        """(B, L, ...) -> (tokens, ...)."""
        whole = padded.flatten(0, 1)
        return whole if self.places is None else collect(whole, self.places.first)


@dataclass(eq=False)
class PackedRows:
    """Sequences of like length, one after the other. No list, for into one a compiled layer would look, and be compiled
    anew for every batch."""

    groups: list[Group]


class Packing(NamedTuple):
    """How the real tokens of a padded batch (B, L) lie in a row of S."""

    places: Places
    """In the batch."""
    groups: list[Group]
    """Sequences of like length, one after the other."""

    @classmethod
    def of(cls, mask: Tensor, input_ids: Tensor) -> "Packing":
        """Of the real tokens in a mask (B, L), bool, wherever the padding is; each row is its own sequence."""
        device, mask, input_ids = mask.device, mask.cpu(), input_ids.cpu()
        kinds: dict[float, list[int]] = {}
        for row, length in enumerate(mask.sum(1).tolist()):
            if length:
                steps = 2 * math.log2(length / SMALLEST) if device.type == "cpu" else 0
                kinds.setdefault(max(math.ceil(steps), 0), []).append(row)
        groups, source, first, again = [], torch.zeros(mask.numel(), dtype=torch.long), [], []
        for kind in sorted(kinds):
            rows = sorted(kinds[kind], key=lambda row: input_ids[row][mask[row]].tolist())
            own_cells = [row * mask.shape[1] + mask[row].nonzero().squeeze(1) for row in rows]
            cells = nn.utils.rnn.pad_sequence(own_cells, batch_first=True, padding_value=-1)
            numbers, *kinds_of_cells = _once(input_ids.flatten()[cells].where(cells >= 0, -1))
            is_here, before = cells.flatten() >= 0, sum(group.tokens for group in groups)
            source[cells.flatten()[is_here]] = before + numbers[is_here]
            for found, of_group in zip((first, again), kinds_of_cells, strict=True):
                found.append(cells.flatten()[of_group])
            tokens = len(first[-1])
            places = None if tokens == cells.numel() else Places.of(numbers, *kinds_of_cells, device)
            groups.append(Group(tokens, places, tuple(cells.shape)))
        return cls(Places.of(source, torch.cat(first), torch.cat(again), device), groups)


def _once(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where tokens stand that lie in a row once, however many sequences begin with them.

    Args:
        ids: of sequences (B, L) in the order of a dictionary, -1 behind their ends.

    Returns:
        (B · L,) numbers of the tokens in the row, any behind the ends; the cells that are the first of a token, and
        those in which it stands again.
    """
    inside = ids >= 0
    again = torch.zeros_like(inside)
    again[1:] = ((ids[1:] == ids[:-1]) & inside[1:]).cumprod(1).bool()  # as far as a sequence is the one above it
    again &= again.sum() >= WORTH * inside.sum()
    own = inside & ~again
    rows = torch.arange(len(ids))[:, None].expand_as(ids)
    owner = rows.where(own, 0).cummax(0).values
    number = own.flatten().cumsum(0).view_as(ids) - 1
    return number.gather(0, owner).flatten(), *(x.flatten().nonzero().squeeze(1) for x in (own, again))


def spread(rows: Tensor, places: Places) -> Tensor:
    """(cells, ...): the rows where they stand, 0 elsewhere."""
    return _Spread.apply(rows, *places)


def collect(rows: Tensor, cells: Tensor) -> Tensor:
    """(len(cells), ...): the rows at some places, none of them twice."""
    return _Collect.apply(rows, cells)


class _Spread(torch.autograd.Function):
    """Autograd's own backward of an index allows for equal ones anywhere, slowly, and rounds each sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, first: Tensor, empty: Tensor, *shared: Tensor) -> Tensor:
        ctx.save_for_backward(first, *shared)
        spread = rows[source]
        return spread.index_fill_(0, empty, 0) if len(empty) else spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, again, shared, which = ctx.saved_tensors
        of_rows = grad[first]
        if len(again):
            more = grad[again].to(torch.promote_types(grad.dtype, torch.float32))
            sums = more.new_zeros(len(shared), *more.shape[1:]).index_add_(0, which, more)
            of_rows[shared] = (of_rows[shared] + sums).to(grad.dtype)
        return of_rows, *[None] * 6


class _Collect(torch.autograd.Function):
    """The other way round."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cells: Tensor) -> Tensor:
        ctx.save_for_backward(cells)
        ctx.size = len(rows)
        return rows[cells]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        spread = grad.new_zeros(ctx.size, *grad.shape[1:])
        spread[ctx.saved_tensors[0]] = grad
        return spread, None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_rows: PackedRows | None = None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention, by torch or written out; with `packed_rows`, causal within each sequence.

    Args:
        module: the attention layer.
        query: (B, heads, L, D), or (1, heads, S, D) with `packed_rows`; so are key and value.
        key: with as many heads or fewer.
        value: likewise.
        attention_mask: what `sdpa` takes; with `packed_rows` nothing is read from it.
        packed_rows: where the sequences lie.
        scaling: of the products.
        dropout: of the weights.
        **kwargs: what `sdpa` takes.
    """
    kwargs |= {"scaling": scaling, "dropout": dropout}
    if packed_rows is None and is_step(query):
        return step_attention(query, key, value, attention_mask, scaling).transpose(1, 2), None
    if packed_rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return _side_by_side(module, query, key, value, packed_rows, **kwargs), None


@torch.compiler.disable  # what it does depends on the sequences of each batch
def _side_by_side(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed_rows: PackedRows,
    scaling: float,
    dropout: float,
    **kwargs: Any,
) -> Tensor:
    """Attention within each sequence, (1, heads, S, D) -> (1, S, heads, D)."""
    groups = packed_rows.groups
    parts = [x[0].transpose(0, 1).split([group.tokens for group in groups]) for x in (query, key, value)]
    rows = []
    for group, *own in zip(groups, *parts, strict=True):
        sides = [group.side_by_side(part).transpose(1, 2) for part in own]
        if is_short(sides[0]) and not dropout:
            out = short_attention(*sides, scaling).transpose(1, 2)
        else:
            out, _ = sdpa_attention_forward(module, *sides, None, scaling=scaling, dropout=dropout, **kwargs)
        rows.append(group.in_a_row(out))
    return (rows[0] if len(rows) == 1 else torch.cat(rows))[None]


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def can_be_padding_free(model: nn.Module) -> bool:
    """Whether a model is known to read packed rows as it reads padded ones: by its type, without sliding windows."""
    is_shipped = isinstance(model, PreTrainedModel) and type(model).__module__.startswith("transformers.")
    if not is_shipped or model.config.model_type not in VERIFIED:
        return False
    config = model.config
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if kinds is None else None
    is_full = window is None and all(kind == "full_attention" for kind in kinds or ())
    return is_full and config._attn_implementation in ("sdpa", ATTENTION)


def packed_inputs(packing: Packing, input_ids: Tensor, positions: Tensor) -> dict[str, Any]:
    """Arguments for a model: the tokens (B, L) in one row."""
    return {
        "input_ids": input_ids.flatten()[packing.places.first][None],
        "position_ids": positions.flatten()[packing.places.first][None],
        # transformers takes a mask of four dimensions as it is, and so does not make one of S x S.
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
        "packed_rows": PackedRows(packing.groups),
    }
