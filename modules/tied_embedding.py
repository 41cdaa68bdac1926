"""An embedding whose weight is the head's, too, and whose gradient is added to that of the head.

Autograd makes a gradient of the size of the whole vocabulary for the embedding, of which all rows but those of the
tokens are 0, beside that of the head, and adds up the two. Here the head takes the weight from the embedding's
function, whose backward so has the head's gradient in hand when it comes to its own few rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding

from ..functional.linear_logprobs import add_rows


def is_tied(embed: nn.Module, head: nn.Module) -> bool:
    """Whether both have one weight, which is trained, and nothing else."""
    is_plain = type(embed) is nn.Embedding and type(embed.weight) is nn.Parameter and embed.max_norm is None
    return is_plain and embed.weight is head.weight and embed.weight.requires_grad and torch.is_grad_enabled()


def tied_embedding(embed: nn.Embedding, use: Callable[[Tensor], None]) -> Callable[[Tensor], Tensor]:
    """The embedding's forward; `use` is given the weight that the head is to have in this pass, and no one else."""

    def forward(ids: Tensor) -> Tensor:
        rows, weight = _TiedEmbedding.apply(ids, embed.weight, embed.padding_idx)
        use(weight)
        return rows

    return forward


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids, weight)
        ctx.padding_idx = padding_idx
        ctx.set_materialize_grads(False)
        return embedding(ids, weight), weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, of_head: Tensor | None) -> tuple[None, Tensor, None]:
        ids, weight = ctx.saved_tensors
        total = torch.zeros_like(weight) if of_head is None else of_head  # nobody else has it: see `use`
        if grad is not None:
            counts = torch.ones_like(ids, dtype=torch.bool) if ctx.padding_idx is None else ids != ctx.padding_idx
            total = add_rows(total, ids[counts], grad[counts].to(torch.promote_types(grad.dtype, torch.float32)))
        return None, total, None
