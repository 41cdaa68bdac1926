"""Sequences one after the other in one row, without padding, for models whose only mixing of tokens is attention.

A model takes them as one sequence of S tokens whose positions start anew. Attention alone must know where a sequence
ends: it is told by a keyword that transformers hands through to the attention function, which is ours. That puts
sequences of like length side by side again, padded on the right, where causal attention needs no mask. So padding costs
attention only, and there not much; linear layers, norms and activations see none of it.
"""

from collections.abc import Sequence
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


class Group(NamedTuple):
    """Sequences next to each other in a row of tokens."""

    tokens: int
    cells: Tensor | None
    """(tokens,) number of each token's cell in the padded (B, L); None if no sequence is shorter than another."""
    shape: tuple[int, int]
    """B, L."""

    @classmethod
    def of(cls, lengths: Tensor) -> "Group":
        """Of sequences (B,) of so many tokens."""
        longest, tokens = int(lengths.max()), int(lengths.sum())
        shape = len(lengths), longest
        if tokens == shape[0] * longest:
            return cls(tokens, None, shape)
        inside = torch.arange(longest, device=lengths.device) < lengths[:, None]
        return cls(tokens, inside.flatten().nonzero().squeeze(1), shape)

    def side_by_side(self, packed: Tensor) -> Tensor:
        """(tokens, ...) -> (B, L, ...), zeros behind the ends."""
        whole = packed if self.cells is None else spread(packed, self.cells, self.shape[0] * self.shape[1])
        return whole.view(*self.shape, *packed.shape[1:])

    def in_a_row(self, padded: Tensor) -> Tensor:
        """(B, L, ...) -> (tokens, ...)."""
        whole = padded.flatten(0, 1)
        return whole if self.cells is None else collect(whole, self.cells)


class Packing(NamedTuple):
    """How the real tokens of a padded batch (B, L) lie in a row of S."""

    cells: Tensor
    """(S,) number of the cell that each is from."""
    groups: list[Group]
    """Sequences of like length, one after the other."""

    @classmethod
    def of(cls, mask: Tensor) -> "Packing":
        """Of the real tokens in a mask (B, L), bool, wherever the padding is; each row is its own sequence."""
        present = mask.any(1).nonzero().squeeze(1)
        lengths = mask[present].sum(1)
        steps = 2 * (lengths / SMALLEST).log2() if mask.device.type == "cpu" else torch.zeros_like(lengths)
        kinds, order = steps.ceil().clamp(min=0).sort(stable=True)
        sizes = kinds.unique_consecutive(return_counts=True)[1].tolist()
        groups = [Group.of(part) for part in lengths[order].split(sizes)]
        rows, columns = mask[present[order]].nonzero(as_tuple=True)
        return cls(present[order][rows] * mask.shape[1] + columns, groups)


def spread(rows: Tensor, cells: Tensor, size: int) -> Tensor:
    """(size, ...): row i at place `cells[i]`, 0 elsewhere; no two in one place."""
    return _Spread.apply(rows, cells, size)


def collect(rows: Tensor, cells: Tensor) -> Tensor:
    """(len(cells), ...): the rows at some places, none of them twice."""
    return _Collect.apply(rows, cells)


class _Spread(torch.autograd.Function):
    """Autograd's own backward of an index allows for equal ones, slowly."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cells: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(cells)
        spread = rows.new_zeros(size, *rows.shape[1:])
        spread[cells] = rows
        return spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.saved_tensors[0]], None, None


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
    packed_rows: list[Group] | None = None,
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
    parts = [x[0].transpose(0, 1).split([group.tokens for group in packed_rows]) for x in (query, key, value)]
    rows = []
    for group, *own in zip(packed_rows, *parts, strict=True):
        sides = [group.side_by_side(part).transpose(1, 2) for part in own]
        if is_short(sides[0]) and not dropout:
            out = short_attention(*sides, scaling).transpose(1, 2)
        else:
            out, _ = sdpa_attention_forward(module, *sides, None, **kwargs)
        rows.append(group.in_a_row(out))
    return (rows[0] if len(rows) == 1 else torch.cat(rows))[None], None  # (1, S, heads, D)


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
        "input_ids": input_ids.flatten()[packing.cells][None],
        "position_ids": positions.flatten()[packing.cells][None],
        # transformers takes a mask of four dimensions as it is, and so does not make one of S x S.
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
        "packed_rows": packing.groups,
    }
