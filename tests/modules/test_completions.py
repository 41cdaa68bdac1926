"""Log-probabilities of completions under policy and reference, and which reference that is."""

import pytest
import torch
from conftest import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM

from lightning_rlhf.modules.completions import (
    CompletionModule,
    completion_logits,
    completion_logprobs,
    completions_of,
)

ROWS = [([1, 2], [3, 0]), ([4], [5, 5, 2, 0]), ([6, 7, 7], [0]), ([2], [1, 1])]  # prompt, completion


def batch(rows=ROWS, extra=0, garbage=0):
    width = max(len(p) + len(c) for p, c in rows) + extra
    fill = [width - len(p) - len(c) for p, c in rows]
    return {
        "input_ids": torch.tensor([[*p, *c, *[garbage] * n] for (p, c), n in zip(rows, fill, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - n) + [0] * n for n in fill]),
        "loss_mask": torch.tensor(
            [[False] * len(p) + [True] * len(c) + [False] * n for (p, c), n in zip(rows, fill, strict=True)]
        ),
    }


def slow_logprobs(network):
    """Token by token, one row at a time, float64."""
    found = []
    for prompt, completion in ROWS:
        logits = network(torch.tensor([prompt + completion])).logits[0].double()
        places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        found.append(sum(logits[t].log_softmax(-1)[token] for t, token in zip(places, completion, strict=True)))
    return torch.stack(found)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    make_llama(seed=4, vocab_size=8).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def built(policy):
    def make(**options):
        module = CompletionModule(policy, **options)
        module.configure_model()
        return module

    return make


def moved(module):
    """The module after what could have been training."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    return module


@pytest.mark.parametrize("options", [{}, {"extra": 3, "garbage": 5}], ids=str)
def test_sums_over_the_tokens_of_each_completion(options, policy):
    network = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        found = completion_logprobs(network, batch(**options))
        torch.testing.assert_close(found.logprobs, slow_logprobs(network).float())
    assert found.lengths.tolist() == [2, 4, 1, 2]
    assert found.logprobs.dtype == torch.float32


def test_logits_are_those_before_each_completion_token_row_by_row(policy):
    network = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        logits = completion_logits(network, batch(extra=2))
        assert logits.shape == (9, 8)
        row = network(torch.tensor([[4, 5, 5, 2, 0]])).logits[0]
        torch.testing.assert_close(logits[2:6], row[:4])
        assert torch.equal(
            completions_of(logits, batch()).logprobs, completion_logprobs(network, batch(extra=2)).logprobs
        )


def test_gradients_are_those_of_the_slow_sums(policy):
    networks = [AutoModelForCausalLM.from_pretrained(policy) for _ in range(2)]
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    (completion_logprobs(networks[0], batch(extra=1)).logprobs @ weights).backward()
    (slow_logprobs(networks[1]).float() @ weights).backward()
    for found, expected in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_the_reference_is_the_policy_at_the_start(options, built, policy):
    module = moved(built(**options))
    with torch.no_grad():
        start = slow_logprobs(AutoModelForCausalLM.from_pretrained(policy)).float()
        torch.testing.assert_close(module.reference_logprobs(batch()), start)
        assert (completion_logprobs(module.policy, batch()).logprobs - start).abs().max() > 1e-2
    assert not module.reference_logprobs(batch()).requires_grad


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_another_network_can_be_the_reference(options, built, other):
    module = moved(built(reference=other, **options))
    with torch.no_grad():
        expected = slow_logprobs(AutoModelForCausalLM.from_pretrained(other)).float()
        torch.testing.assert_close(module.reference_logprobs(batch()), expected)
    assert not any("reference" in name for name, _ in module.named_parameters())


def test_methods_without_a_reference_load_none(policy, monkeypatch):
    monkeypatch.setattr(CompletionModule, "uses_reference", False)
    module = CompletionModule(policy)
    module.configure_model()
    assert module.reference is None
    assert module.reference_logprobs(batch()).tolist() == [0, 0, 0, 0]
