"""Sampling with a cache of fixed size, so that every step is the same compiled program.

On a GPU a step for some dozens of sequences is over before its hundreds of kernels can be launched one by one. Compiled
by `torch.compile` there are fewer of them, and as a CUDA graph they are launched all at once.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from .backbone import unwrapped
from .decoding import Decoding

ROOM = 128
"""Tokens by which caches differ in size: prompts that are a little longer find the same program."""


def can_be_compiled(model: nn.Module) -> bool:
    """Whether transformers says of a model that it can be one program, and all its layers cache all tokens."""
    bare = unwrapped(model)
    if not isinstance(bare, PreTrainedModel) or not (bare._can_compile_fullgraph and bare._supports_sdpa):
        return False
    return all(type(layer) is StaticLayer for layer in StaticCache(bare.config, max_cache_len=1).layers)


class CompiledDecoding(Decoding):
    """A batch on its way through a model, all its rows to the end.

    Prompts are read as they are otherwise, since each batch of them has a shape of its own.
    """

    LOOKS = 8  # a look waits for the GPU, and then the GPU waits for its next step

    @classmethod
    def start(
        cls, model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, new_tokens: int, compact: bool
    ) -> "CompiledDecoding":
        """See `Decoding.start`; what was read goes into a cache with room for all."""
        batch = super().start(model, prompt_ids, prompt_mask, new_tokens, compact)
        tokens = ROOM * math.ceil((prompt_ids.shape[1] + new_tokens) / ROOM)
        cache = StaticCache(unwrapped(model).config, max_cache_len=tokens)
        for layer, read in zip(cache.layers, batch.cache.layers, strict=True):
            layer.update(read.keys, read.values)
        batch.cache, batch.is_divisible = cache, False
        # What is not there yet is not seen, as each token sees up to itself: so the mask, too, stays as it is.
        batch.mask = pad(batch.mask, (0, tokens - batch.mask.shape[1]), value=1)
        return batch

    def step(self, tokens: Tensor, running: Tensor) -> None:
        """Read one more token (rows, 1) of each row."""
        self.position = self.position + 1
        inputs = {"attention_mask": self.mask, "position_ids": self.position, "past_key_values": self.cache}
        torch.compiler.cudagraph_mark_step_begin()  # the logits of the step before may be overwritten
        self.logits = _program(unwrapped(self.model), input_ids=tokens, **inputs)


@torch.compile(mode="reduce-overhead", recompile_limit=64)
def _program(model: PreTrainedModel, **inputs: Any) -> Tensor:
    return model(use_cache=True, logits_to_keep=1, **inputs).logits
