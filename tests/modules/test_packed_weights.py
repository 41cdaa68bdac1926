"""Weights laid out for few rows: the same numbers to the last bit, and the model is as it was afterwards."""

import pytest
import torch
from conftest import make_llama
from torch import nn

from lightning_rlhf.modules import PPOModule
from lightning_rlhf.modules.backbone import add_lora
from lightning_rlhf.modules.packed_weights import _can_be_packed, packed_weights

IDS = torch.tensor([[1, 5, 3], [2, 6, 4]])
BFLOAT16 = torch.empty(0, dtype=torch.bfloat16)
needs_onednn = pytest.mark.skipif(not _can_be_packed(nn.Parameter(BFLOAT16)), reason="a CPU without such products")


def model_of(dtype: torch.dtype = torch.bfloat16, **changes: object) -> nn.Module:
    return make_llama(vocab_size=8, **changes).to(dtype).eval()


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@needs_onednn
@pytest.mark.parametrize("rows", [1, 2, 64])
@pytest.mark.parametrize("kind", ["plain", "bias", "tied", "lora"])
@torch.no_grad()
def test_the_same_to_the_last_bit(kind, rows):
    torch.manual_seed(0)
    model = model_of(attention_bias=kind == "bias", tie_word_embeddings=kind == "tied")
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    if kind == "lora":
        model = add_lora(model, 2, 4, "all-linear")
    for ids in (IDS, IDS[:1, :1]):
        expected = model(ids).logits
        with packed_weights(model, rows):
            assert len(replaced(model)) == 2 * 7 + 1
            assert torch.equal(model(ids).logits, expected)
        assert replaced(model) == []
        assert torch.equal(model(ids).logits, expected)


@needs_onednn
@torch.no_grad()
def test_later_weights_count():
    model = model_of()
    with packed_weights(model, 2):
        before = model(IDS).logits
    for p in model.parameters():
        p.mul_(0.5)
    after = model(IDS).logits
    with packed_weights(model, 2):
        assert torch.equal(model(IDS).logits, after)
    assert not torch.equal(before, after)


@torch.no_grad()
def test_other_precisions_are_left_alone():
    model = model_of(torch.float32)
    with packed_weights(model, 2):
        assert replaced(model) == []


@needs_onednn
def test_an_error_leaves_the_model_as_it_was():
    model = model_of()
    with pytest.raises(KeyError), packed_weights(model, 2):
        raise KeyError
    assert replaced(model) == []


@needs_onednn
@pytest.mark.parametrize("packed", [True, False])
def test_it_is_a_flag(short, new_prompts, packed):
    module = short(PPOModule)(packed_weights=packed, dtype="bfloat16")
    module.configure_model()
    module._seed, seen = 1, []
    module.policy.register_forward_hook(lambda *_: seen.append(len(replaced(module.policy))))
    rollout = module.roll_out(new_prompts().batch(["\1\2"] * 4), range(4))
    assert set(seen) == {15 if packed else 0}
    assert rollout.response_mask.any()
