"""Token by token through a language model: the key-value cache, and which rows of the batch are still in it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..functional import position_ids
from .backbone import unwrapped

CROWDED = 0.75  # rows are let go once no more than this share of them runs: each copy of the cache pays for itself


@dataclass
class Decoding:
    """A batch on its way through a model."""

    LOOKS: ClassVar[int] = 1
    """After every so many tokens it is looked whether all rows have ended; more of them change nothing."""

    model: nn.Module
    mask: Tensor
    """(rows, L) of prompt and response so far."""
    position: Tensor
    """(rows, 1) of the last token."""
    rows: Tensor
    """(rows,) which rows of the whole batch they are."""
    cache: Any
    logits: Tensor
    """(rows, 1, V), of the next token."""
    is_divisible: bool
    """Whether rows can be taken out of the cache."""

    @classmethod
    def start(
        cls, model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, new_tokens: int, compact: bool
    ) -> "Decoding":
        """Read the prompts (B, P), left-padded, each to go on for at most so many tokens.

        If `compact`, equal prompts that stand next to each other are read once.
        """
        rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
        first, group = rows, rows
        cache = _divisible_cache(model, prompt_ids.shape[1] + new_tokens) if compact else None
        if cache is not None:
            told_apart = torch.where(prompt_mask > 0, prompt_ids, -1)  # a pad token may be in a prompt, too
            _, group, sizes = told_apart.unique_consecutive(dim=0, return_inverse=True, return_counts=True)
            first = sizes.cumsum(0) - sizes
        mask, position = prompt_mask[first], position_ids(prompt_mask[first])
        out = _forward(model, prompt_ids[first], mask, position, cache)
        last = position[:, -1:], rows[first], out.past_key_values, out.logits[:, -1:]
        batch = cls(model, mask, *last, is_divisible=cache is not None)
        if len(first) < len(rows):
            batch.choose(group)
            batch.rows = rows
        return batch

    def choose(self, rows: Tensor) -> None:
        """Go on with some rows, in some order, maybe several times."""
        self.mask, self.position, self.rows = self.mask[rows], self.position[rows], self.rows[rows]
        self.logits = self.logits[rows]
        self.cache.batch_select_indices(rows)

    def step(self, tokens: Tensor, running: Tensor) -> None:
        """Read one more token (rows, 1) of each row; the rows that do not run may be let go before."""
        if self.is_divisible and 0 < (count := int(running.sum())) <= CROWDED * len(running) and count < len(running):
            kept = running.nonzero().squeeze(1)
            self.choose(kept)
            tokens = tokens[kept]
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)
        self.position = self.position + 1
        out = _forward(self.model, tokens, self.mask, self.position, self.cache)
        self.cache, self.logits = out.past_key_values, out.logits[:, -1:]


def _forward(model: nn.Module, tokens: Tensor, mask: Tensor, position: Tensor, cache: Any) -> Any:
    return model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )


def _divisible_cache(model: nn.Module, most: int) -> DynamicCache | None:
    """The cache that the model would make itself, if rows can be taken out of it and repeated; where it only grows,
    with room to do so, up to so many tokens."""
    bare = unwrapped(model)
    if not isinstance(bare, PreTrainedModel) or not bare._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=bare.config)
    if not cache.layers or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer(most) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer, (rows, heads, L, D), as views of tensors with room for more tokens.

    transformers' own are copied whole for every token.

    Args:
        most: tokens that there will be at most; more are not refused, but find no room kept for them.
    """

    GROWTH = 1.5

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens, give all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rooms = [key_states[:, :, :0], value_states[:, :, :0]]
        seen = self.get_seq_length()
        length = seen + key_states.shape[-2]
        for i, new in enumerate((key_states, value_states)):
            if length > self.rooms[i].shape[-2]:
                tokens = max(length, min(int(self.GROWTH * length), self.most))
                room = new.new_empty(*new.shape[:-2], tokens, new.shape[-1])
                room[:, :, :seen] = self.rooms[i][:, :, :seen]
                self.rooms[i] = room
            self.rooms[i][:, :, seen:length] = new
        self.keys, self.values = (room[:, :, :length] for room in self.rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with some rows."""
        super().batch_select_indices(indices)
        self.rooms = [self.keys, self.values]
