"""RMSNorms with a backward of their own, held to autograd's of the classes they stand for."""

import copy
import importlib

import pytest
import torch
from conftest import make_llama
from torch import nn

from lightning_rlhf.modules.fused_norm import SAME, FusedNorm, fuse_norms

SHAPE = (2, 3, 8)


def norm(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    kind = name.removesuffix("RMSNorm").lower()
    module = getattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), name)(8, eps=1e-2)
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    return module.to(dtype)


def run(module: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, weights = (torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    out = module(x)
    return [out.detach(), *torch.autograd.grad((out * weights).float().sum(), [x, module.weight])]


@pytest.mark.parametrize("name", sorted(SAME))
def test_values_and_gradients(name):
    plain = norm(name)
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    assert isinstance(fused, FusedNorm)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for mine, theirs in zip(run(fused, torch.float32), run(plain, torch.float32), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", sorted(SAME))
def test_bfloat16_has_the_same_values_and_no_worse_gradients(name):
    plain = norm(name, torch.bfloat16)
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    mine, theirs = run(fused, torch.bfloat16), run(plain, torch.bfloat16)
    exact = run(copy.deepcopy(plain).float(), torch.float32)
    assert torch.equal(mine[0], theirs[0])
    for a, b, e in zip(mine[1:], theirs[1:], exact[1:], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - e).norm() <= 1.1 * (b - e).norm()


def test_what_is_frozen_gets_no_gradient():
    fused = norm("LlamaRMSNorm").requires_grad_(False)
    fuse_norms(fused)
    x = torch.ones(SHAPE, requires_grad=True)
    fused(x).square().sum().backward()
    assert fused.weight.grad is None
    assert x.grad is not None
    fused.requires_grad_(True)
    fused(x.detach()).sum().backward()
    assert fused.weight.grad is not None


def test_unknown_norms_stay_as_they_are():
    class LlamaRMSNorm(nn.LayerNorm):
        """Another one of that name."""

    class Model(nn.Module):
        """Norms that are not known."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = LlamaRMSNorm(4), nn.RMSNorm(4)

    model = Model()
    fuse_norms(model)
    assert (type(model.a), type(model.b)) == (LlamaRMSNorm, nn.RMSNorm)


def test_a_copy_has_weights_of_its_own():
    model = make_llama(vocab_size=8)
    fuse_norms(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    ids = torch.tensor([[1, 2]])
    assert model(ids).logits.abs().max() > 0
    assert copied(ids).logits.abs().max() == 0
    fuse_norms(model)  # again
    assert model(ids).logits.abs().max() > 0
