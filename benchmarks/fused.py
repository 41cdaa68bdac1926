"""The faster paths one by one, each beside the plain one: forward and backward, milliseconds and what is kept.

    python benchmarks/fused.py                      # a minibatch of 16 sequences of 31 tokens of SmolLM2-135M
    python benchmarks/fused.py --sequences 8 --tokens 256

In bfloat16, with the sizes of SmolLM2-135M. `kept` is what autograd holds between forward and backward. What
one new token takes is a forward pass, over `--tokens` cached ones, of four times as many sequences.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from meters import median_seconds
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lightning_rlhf.functional import linear_logprobs, token_logprobs
from lightning_rlhf.modules.fused_layers import fuse_layers
from lightning_rlhf.modules.short_attention import short_attention, step_attention

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 576, 9, 3, 64, 49152
CONFIG = SimpleNamespace(hidden_size=HIDDEN, intermediate_size=1536, hidden_act="silu", mlp_bias=False)


class Pair(NamedTuple):
    """Two ways to compute the same tensor."""

    name: str
    plain: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    is_trained: bool = True
    """Whether there is a backward pass."""


def normal(*shape: int) -> Tensor:
    """Of N(0, 1), and itself computed from something, as inputs of a layer are."""
    return torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True) + 0


def pairs(sequences: int, tokens: int) -> Iterator[Pair]:
    """Everything that is compared."""
    shapes = ((sequences, tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    query, key, value = (normal(*shape).transpose(1, 2) for shape in shapes)  # as transformers hands them over
    flash = partial(scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)
    yield Pair("causal attention", flash, partial(short_attention, query, key, value, HEAD_DIM**-0.5))
    hidden = normal(1, sequences * tokens, HIDDEN)
    norms = [LlamaRMSNorm(HIDDEN).to(torch.bfloat16) for _ in range(2)]
    fuse_layers(norms[1])
    yield Pair("RMSNorm", partial(norms[0], hidden), partial(norms[1], hidden))
    mlps = [LlamaMLP(CONFIG).to(torch.bfloat16) for _ in range(2)]
    fuse_layers(mlps[1])
    yield Pair("SwiGLU, with its products", partial(mlps[0], hidden), partial(mlps[1], hidden))
    shapes = ((4 * sequences, n, heads, HEAD_DIM) for n, heads in ((1, HEADS), (tokens, KV_HEADS), (tokens, KV_HEADS)))
    query, key, value = (normal(*shape).transpose(1, 2) for shape in shapes)
    flash = partial(scaled_dot_product_attention, query, key, value, enable_gqa=True)
    yield Pair("attention of one token", flash, partial(step_attention, query, key, value, None, HEAD_DIM**-0.5), False)
    layer = nn.Linear(HIDDEN, CONFIG.intermediate_size, bias=False, dtype=torch.bfloat16)
    one = normal(4 * sequences, 1, HIDDEN)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 4 * sequences)
    products = partial(torch.ops.mkldnn._linear_pointwise, one, laid_out, None, "none", [], "")
    yield Pair("gate of one token", partial(layer, one), products, False)
    rows, head = normal(sequences * tokens, HIDDEN), (normal(VOCABULARY, HIDDEN) / 20).detach().requires_grad_()
    ids = torch.randint(VOCABULARY, (len(rows),))
    yield Pair(
        "head and log-probabilities",
        lambda: token_logprobs(linear(rows, head), ids),
        lambda: linear_logprobs(rows, head, ids).logprobs,
    )


def run(function: Callable[[], Tensor], is_trained: bool) -> None:
    """What a training step, or a step of sampling, does with it."""
    if not is_trained:
        torch.no_grad()(function)()
        return
    out = function()
    out.backward(torch.ones_like(out), retain_graph=True)  # the inputs' own graph stays


def kept_mib(function: Callable[[], Tensor]) -> float:
    """MiB of the tensors that autograd keeps, each storage once, those that are there anyway left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base
        if not (whole.is_leaf and whole.requires_grad):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    del out
    return sum(kept.values()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=31)
    parser.add_argument("--repetitions", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    print("| | ms, plain | ours | kept MiB, plain | ours |\n| --- | --- | --- | --- | --- |")
    for pair in pairs(args.sequences, args.tokens):
        both = pair.plain, pair.ours
        ms = [1e3 * median_seconds(partial(run, way, pair.is_trained), args.repetitions) for way in both]
        mib = [kept_mib(way) if pair.is_trained else 0 for way in both]
        print(f"| {pair.name} | {ms[0]:.2f} | {ms[1]:.2f} | {mib[0]:.1f} | {mib[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
