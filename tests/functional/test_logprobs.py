"""Log-probabilities and entropy: golden values, torch.distributions, tokens that cannot come."""

import math

import pytest
import torch
from torch.distributions import Categorical
from torch.testing import assert_close

from lightning_rlhf.functional import entropy, token_logprobs


@pytest.fixture
def logits():
    return torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4


@pytest.fixture
def tokens():
    return torch.tensor([[0, 4, 2], [1, 1, 3]])


def test_token_logprobs_golden():
    # Logits are log 1, log 2, log 5 (sum 8): probabilities 1/8, 2/8, 5/8.
    logits = torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]], dtype=torch.float64).log()
    expected = torch.tensor([2 / 8, 5 / 8], dtype=torch.float64).log()
    assert_close(token_logprobs(logits, torch.tensor([1, 2])), expected)
    # Temperature 1/2 squares the weights: 1, 4, 25 (sum 30).
    expected = torch.tensor([4 / 30, 25 / 30], dtype=torch.float64).log()
    assert_close(token_logprobs(logits, torch.tensor([1, 2]), temperature=0.5), expected)


def test_entropy_golden():
    # Probabilities 1/2, 1/4, 1/4: ½ log 2 + 2 · ¼ log 4 = 1.5 log 2. Three equal ones: log 3.
    logits = torch.tensor([[2.0, 1.0, 1.0], [7.0, 7.0, 7.0]], dtype=torch.float64).log()
    assert_close(entropy(logits), torch.tensor([1.5 * math.log(2), math.log(3)], dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(2, 3, 5), (6, 5), (1, 2, 3, 5)])
def test_both_equal_torch_distributions(logits, tokens, temperature, shape):
    logits, tokens = logits.reshape(shape), tokens.reshape(shape[:-1])
    reference = Categorical(logits=logits / temperature)
    assert_close(token_logprobs(logits, tokens, temperature), reference.log_prob(tokens))
    assert_close(entropy(logits, temperature), reference.entropy())


def test_token_logprobs_gradient_is_that_of_cross_entropy(logits, tokens):
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    token_logprobs(ours, tokens).sum().backward()
    (-torch.nn.functional.cross_entropy(theirs.flatten(0, 1), tokens.flatten(), reduction="sum")).backward()
    assert_close(ours.grad, theirs.grad)


def test_entropy_gradient_is_right_to_finite_differences(logits):
    assert torch.autograd.gradcheck(entropy, logits.clone().requires_grad_())


def test_shifted_logits_give_the_same(logits, tokens):
    assert_close(token_logprobs(logits + 1000, tokens), token_logprobs(logits, tokens))
    assert_close(entropy(logits + 1000), entropy(logits))


def test_probabilities_sum_to_1(logits):
    every_token = [token_logprobs(logits, torch.full((2, 3), v)).exp() for v in range(5)]
    assert_close(sum(every_token), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("impossible", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_impossible_tokens_are_as_if_absent(impossible, temperature):
    possible = torch.tensor([[0.3, -1.2, 2.0]], requires_grad=True)
    logits = torch.tensor([[0.3, -1.2, 2.0, impossible]], requires_grad=True)
    assert_close(entropy(logits, temperature), entropy(possible, temperature))
    assert_close(
        token_logprobs(logits, torch.tensor([1]), temperature), token_logprobs(possible, torch.tensor([1]), temperature)
    )
    (entropy(logits, temperature) + token_logprobs(logits, torch.tensor([1]), temperature)).sum().backward()
    (entropy(possible, temperature) + token_logprobs(possible, torch.tensor([1]), temperature)).sum().backward()
    assert_close(logits.grad[:, :3], possible.grad)
    assert logits.grad[0, 3] == 0


def test_a_certain_token_has_entropy_0_and_logprob_0():
    logits = torch.tensor([[5.0, -math.inf, -math.inf]])
    assert entropy(logits).item() == 0
    assert token_logprobs(logits, torch.tensor([0])).item() == 0


def test_half_precision_logits_give_float32(logits, tokens):
    half = logits.bfloat16()
    assert_close(token_logprobs(half, tokens, 0.7), token_logprobs(half.float(), tokens, 0.7))
    assert_close(entropy(half, 0.7), entropy(half.float(), 0.7))
    assert token_logprobs(half, tokens).dtype == entropy(half).dtype == torch.float32


def test_garbage_in_other_positions_changes_nothing(logits, tokens):
    spoiled = logits.clone()
    spoiled[:, 2] = math.nan
    assert_close(token_logprobs(spoiled, tokens)[:, :2], token_logprobs(logits[:, :2], tokens[:, :2]))
    assert_close(entropy(spoiled)[:, :2], entropy(logits[:, :2]))


def test_wrong_arguments_are_refused(logits, tokens):
    with pytest.raises(ValueError, match=r"`tokens` must have.*\(2, 3\), but has \(2, 2\)"):
        token_logprobs(logits, tokens[:, :2])
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        token_logprobs(logits, tokens, temperature=0.0)
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        entropy(logits, temperature=-1.0)
