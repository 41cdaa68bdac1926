"""The frozen reference: a copy, the adapter switched off, or another network."""

import pytest
import torch
from conftest import make_llama

from lightning_rlhf.modules.backbone import add_lora
from lightning_rlhf.modules.reference import FrozenReference

IDS = torch.tensor([[1, 2, 3, 4, 5]])


def adapted():
    """A LoRA model whose adapters do something."""
    model = add_lora(make_llama(vocab_size=8), r=4, alpha=8, target_modules="all-linear")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_the_reference_stays_where_the_policy_was():
    model = make_llama(vocab_size=8)
    before = logits(model)
    reference = FrozenReference(model)
    model.lm_head.weight.data.mul_(2)
    with reference() as frozen:
        assert torch.equal(logits(frozen), before)
        assert not any(p.requires_grad for p in frozen.parameters())
        assert not frozen.training
    assert not torch.allclose(logits(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_the_reference_of_a_lora_policy_is_the_policy_without_its_adapter():
    model = adapted()
    on = logits(model)
    with FrozenReference(model)() as frozen:
        assert frozen is model
        torch.testing.assert_close(logits(frozen), logits(make_llama(vocab_size=8)))
    assert torch.equal(logits(model), on)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_an_error_in_the_reference_leaves_the_adapter_on():
    model = adapted()
    on = logits(model)
    with pytest.raises(RuntimeError), FrozenReference(model)():
        raise RuntimeError
    assert torch.equal(logits(model), on)


@pytest.mark.parametrize("make", [lambda: make_llama(vocab_size=8), adapted], ids=["full", "lora"])
def test_another_network_can_be_the_reference(make):
    other = make_llama(seed=4, vocab_size=8)
    with FrozenReference(make(), other)() as frozen:
        assert frozen is other
        torch.testing.assert_close(logits(frozen), logits(make_llama(seed=4, vocab_size=8)))
        assert not any(p.requires_grad for p in frozen.parameters())
