"""Attention written out, held to sums over tokens and to autograd."""

import math
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lightning_rlhf.modules.short_attention import SHORT, is_short, is_step, short_attention, step_attention

SCALE = 0.4
module = sys.modules[short_attention.__module__]


def inputs(heads: int, fewer: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, heads, 5, 4), (2, fewer, 5, 4), (2, fewer, 5, 4))
    # As transformers hands them over: views of (B, L, heads, D).
    made = (torch.randn(b, L, h, d, generator=generator, dtype=torch.float64) for b, h, L, d in shapes)
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in made]


def slow(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    B, heads, L, _ = query.shape
    shared = heads // key.shape[1]
    rows = []
    for b in range(B):
        for h in range(heads):
            for i in range(L):
                weights = [(SCALE * query[b, h, i] @ key[b, h // shared, j]).exp() for j in range(i + 1)]
                rows.append(sum(w * value[b, h // shared, j] for j, w in enumerate(weights)) / sum(weights))
    return torch.stack(rows).view(query.shape)


@pytest.mark.parametrize("block", [1, 2, 4, 5, 64])
@pytest.mark.parametrize(("heads", "fewer"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_values_and_gradients(monkeypatch, heads, fewer, block):
    monkeypatch.setattr(module, "BLOCK", block)
    tensors = inputs(heads, fewer)
    got, expected = short_attention(*tensors, SCALE), slow(*tensors)
    torch.testing.assert_close(got, expected)
    weights = torch.linspace(-1, 1, got.numel()).view(got.shape)
    mine, theirs = (torch.autograd.grad((x * weights).sum(), tensors) for x in (got, expected))
    torch.testing.assert_close(mine, theirs)


def test_bfloat16_is_rounded_once():
    tensors = inputs(4, 2, torch.bfloat16)
    got = short_attention(*tensors, SCALE)
    assert got.dtype == torch.bfloat16
    exact = [x.detach().float().requires_grad_() for x in tensors]
    expected = slow(*exact)
    assert torch.equal(got, expected.bfloat16()) or (got - expected).abs().max() < 2**-8 * expected.abs().max()
    got.float().sum().backward()
    for mine, theirs in zip(tensors, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert mine.grad.dtype == torch.bfloat16
        assert (mine.grad - theirs).norm() < 2**-7 * theirs.norm()


def test_autocast_changes_nothing():
    tensors = inputs(4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = short_attention(*tensors, SCALE)
    assert torch.equal(got, short_attention(*tensors, SCALE))
    got.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in tensors)


def test_where_it_is_used():
    short, long = torch.zeros(1, 1, SHORT, 2), torch.zeros(1, 1, SHORT + 1, 2)
    assert is_short(short)
    assert not is_short(long)
    assert not is_short(short.to("meta"))
    assert math.isclose(short_attention(*torch.ones(3, 1, 1, 1, 2), 1.0).sum().item(), 2)


@pytest.mark.parametrize("masked", ["no", "bool", "float"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_one_new_token_attends_as_torch_has_it(monkeypatch, masked, rows):
    monkeypatch.setattr(module, "CACHED", rows * 2 * 7 * 4)  # of 5 rows, so many at a time
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(5, h, n, 4, generator=generator) for h, n in ((6, 1), (2, 7), (2, 7)))
    mask = torch.rand(5, 1, 1, 7, generator=generator) < 0.6
    mask[..., -1] = True
    if masked == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    mask = None if masked == "no" else mask
    expected = scaled_dot_product_attention(query, key, value, mask, scale=SCALE, enable_gqa=True)
    torch.testing.assert_close(step_attention(query, key, value, mask, SCALE), expected)


def test_steps_are_single_queries_without_gradient():
    query = torch.zeros(2, 3, 1, 4)
    assert not is_step(query)
    with torch.no_grad():
        assert is_step(query)
        assert not is_step(torch.zeros(2, 3, 2, 4))
