"""Layers with a backward of their own, held to autograd's of the classes they stand for."""

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama
from torch import nn

from lightning_rlhf.modules.backbone import add_lora
from lightning_rlhf.modules.fused_layers import GATED_MLPS, RMS_NORMS, FusedMLP, FusedNorm, fuse_layers

SHAPE = (2, 3, 8)


def kind_of(name: str, suffix: str) -> type[nn.Module]:
    kind = name.removesuffix(suffix).lower()
    return getattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), name)


def norm(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    module = kind_of(name, "RMSNorm")(8, eps=1e-2)
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    return module.to(dtype)


def mlp(name: str, activation: str = "silu", bias: bool = False) -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "hidden_act": activation, "mlp_bias": bias}
    module = kind_of(name, "MLP")(SimpleNamespace(**sizes))
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        nn.init.normal_(p, generator=generator)
    return module


def run(module: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, weights = (torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    out = module(x)
    trained = [p for p in module.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad((out * weights).float().sum(), [x, *trained])]


@pytest.mark.parametrize("name", sorted(RMS_NORMS))
def test_values_and_gradients(name):
    plain = norm(name)
    fused = copy.deepcopy(plain)
    fuse_layers(fused)
    assert isinstance(fused, FusedNorm)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for mine, theirs in zip(run(fused, torch.float32), run(plain, torch.float32), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", sorted(RMS_NORMS))
def test_bfloat16_has_the_same_values_and_no_worse_gradients(name):
    plain = norm(name, torch.bfloat16)
    fused = copy.deepcopy(plain)
    fuse_layers(fused)
    mine, theirs = run(fused, torch.bfloat16), run(plain, torch.bfloat16)
    exact = run(copy.deepcopy(plain).float(), torch.float32)
    assert torch.equal(mine[0], theirs[0])
    for a, b, e in zip(mine[1:], theirs[1:], exact[1:], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - e).norm() <= 1.1 * (b - e).norm()
    with torch.no_grad():
        assert torch.equal(run_forward(fused), run_forward(plain))


def run_forward(module: nn.Module) -> torch.Tensor:
    return module(torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).bfloat16())


def test_what_is_frozen_gets_no_gradient():
    fused = norm("LlamaRMSNorm").requires_grad_(False)
    fuse_layers(fused)
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
    fuse_layers(model)
    assert (type(model.a), type(model.b)) == (LlamaRMSNorm, nn.RMSNorm)


def test_a_copy_has_weights_of_its_own():
    model = make_llama(vocab_size=8)
    fuse_layers(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    ids = torch.tensor([[1, 2]])
    assert model(ids).logits.abs().max() > 0
    assert copied(ids).logits.abs().max() == 0
    fuse_layers(model)  # again
    assert model(ids).logits.abs().max() > 0


@pytest.mark.parametrize("name", sorted(GATED_MLPS))
def test_swiglu_has_autograds_values_and_gradients(name):
    plain = mlp(name)
    fused = copy.deepcopy(plain)
    fuse_layers(fused)
    assert isinstance(fused, FusedMLP)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for mine, theirs in zip(run(fused, torch.float32), run(plain, torch.float32), strict=True):
        torch.testing.assert_close(mine, theirs)
    # The same operations in the same order round alike.
    for mine, theirs in zip(run(fused.bfloat16(), torch.bfloat16), run(plain.bfloat16(), torch.bfloat16), strict=True):
        assert torch.equal(mine, theirs)


def test_swiglu_keeps_its_two_inputs_and_nothing_else():
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    fused = mlp("LlamaMLP")
    fuse_layers(fused)
    x = torch.randn(SHAPE)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused(x)
    weights = {p.data_ptr() for p in fused.parameters()} | {x.data_ptr()}
    assert [size for at, size in kept.items() if at not in weights] == [6 * 12] * 2


@pytest.mark.parametrize("bias", [False, True])
def test_a_down_projection_that_is_more_than_a_product_is_called(bias):
    model = make_llama(vocab_size=8, mlp_bias=bias)
    if not bias:
        torch.manual_seed(0)
        model = add_lora(model, 2, 4, "all-linear")
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)
    plain = copy.deepcopy(model)
    fuse_layers(model)
    ids, found = torch.tensor([[1, 2, 3]]), []
    for network in (model, plain):
        network(ids).logits.square().sum().backward()
        found.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, mine in found[0].items():
        torch.testing.assert_close(mine, found[1][name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_swiglu_under_autocast():
    plain = mlp("LlamaMLP")
    fused = copy.deepcopy(plain)
    fuse_layers(fused)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = run(fused, torch.float32), run(plain, torch.float32)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_other_activations_stay_as_they_are():
    module = mlp("LlamaMLP", activation="gelu")
    kind = type(module)
    fuse_layers(module)
    assert type(module) is kind
