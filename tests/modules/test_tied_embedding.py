"""The gradient of a weight that is embedding and head, held to autograd's own."""

import pytest
import torch
from conftest import make_llama
from torch import nn

from lightning_rlhf.modules.reading import read, set_fast_paths
from lightning_rlhf.modules.tied_embedding import is_tied, tied_embedding

IDS = torch.tensor([[1, 3, 3, 0], [3, 2, 0, 5]])


def gradients(padding_idx: int | None, uses_head: bool, uses_rows: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of the weight: by autograd, and as it is done here."""
    torch.manual_seed(2)
    embed = nn.Embedding(7, 5, padding_idx=padding_idx, dtype=dtype)
    head = nn.Linear(5, 7, bias=False, dtype=dtype)
    head.weight = embed.weight
    assert is_tied(embed, head)
    found, given = [], []
    for forward in (embed, tied_embedding(embed, given.append)):
        rows = forward(IDS)
        weight = given[0] if given else embed.weight
        out = (rows if uses_rows else rows.detach()).tanh()
        loss = (out @ weight.T).square().sum() if uses_head else out.sum()
        (found_one,) = torch.autograd.grad(loss, embed.weight)
        found.append(found_one)
    return found


@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize(("uses_head", "uses_rows"), [(True, True), (True, False), (False, True)])
def test_it_is_autograds_own(padding_idx, uses_head, uses_rows):
    expected, found = gradients(padding_idx, uses_head, uses_rows, torch.float64)
    torch.testing.assert_close(found, expected)
    assert expected.abs().sum() > 0


def test_tokens_that_come_often_are_added_up_in_float32():
    embed = nn.Embedding(2, 1, dtype=torch.bfloat16)
    rows = tied_embedding(embed, lambda weight: None)(torch.zeros(8, dtype=torch.long))
    rows.backward(torch.tensor([1.0] + [2**-8] * 7).bfloat16()[:, None])
    assert embed.weight.grad[0].item() == torch.tensor(1 + 7 * 2**-8).bfloat16().item()  # in bfloat16 it would stay 1


def test_what_is_not_tied_trained_or_plain():
    embed, head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
    assert not is_tied(embed, head)
    head.weight = embed.weight
    assert is_tied(embed, head)
    with torch.no_grad():
        assert not is_tied(embed, head)
    embed.weight.requires_grad_(False)
    assert not is_tied(embed, head)
    scaled = type("Scaled", (nn.Embedding,), {})(7, 5)
    head.weight = scaled.weight
    assert not is_tied(scaled, head)


def tied_llama() -> nn.Module:
    model = make_llama(vocab_size=11)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model.double()


@pytest.mark.parametrize("reads", [1, 2])
def test_a_model_that_is_read_has_the_gradients_of_the_plain_way(reads):
    mask, where = torch.ones_like(IDS), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]]).bool()
    found = []
    for is_fast in (False, True):
        model = tied_llama()
        set_fast_paths(model, is_fast, is_fast, is_fast)
        losses = [read(model, IDS + i, mask, where).logprobs.square().sum() for i in range(reads)]
        for _ in range(2):  # gradients add up over micro-batches, too
            sum(losses).backward(retain_graph=True)
        found.append({name: p.grad for name, p in model.named_parameters()})
        assert model.get_input_embeddings()(IDS).shape == (2, 4, model.config.hidden_size)
    for name, expected in found[0].items():
        close = dict(rtol=1e-4, atol=1e-5)  # norms and logits are in float32
        torch.testing.assert_close(found[1][name], expected, **close, msg=lambda m, name=name: f"{name}: {m}")


def test_no_gradient_of_the_whole_vocabulary_is_made_for_the_embedding():
    model = tied_llama()
    set_fast_paths(model, True, True, True)
    said = read(model, IDS, torch.ones_like(IDS), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]]).bool())
    with torch.profiler.profile() as profile:
        said.logprobs.sum().backward()
    assert not [event.key for event in profile.key_averages() if "embedding" in event.key and "dense" in event.key]
