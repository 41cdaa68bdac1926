"""GAE against the double sum of its definition, and at its two limits."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.functional import gae

LENGTHS = [4, 1, 6, 3]


def random_case():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor(LENGTHS).unsqueeze(1)
    bootstrap_value = torch.randn(4, generator=generator, dtype=torch.float64)
    return rewards, values, mask, bootstrap_value


def td_errors(rewards, values, gamma, bootstrap_value):
    """δ of one unpadded row, as a list."""
    following = [*values[1:], bootstrap_value]
    return [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]


def gae_by_definition(rewards, values, mask, gamma, gae_lambda, bootstrap_value):
    """The double sum, row by row, on unpadded rows."""
    advantages = torch.zeros_like(values)
    for i, length in enumerate(mask.sum(1).tolist()):
        deltas = td_errors(rewards[i, :length], values[i, :length], gamma, bootstrap_value[i])
        for t in range(length):
            advantages[i, t] = sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, length))
    return advantages


def test_golden():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 3.0, 50.0]], dtype=torch.float64)
    values = torch.tensor([[2.0, 4.0, 2.0], [2.0, 4.0, 60.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    # gamma = lambda = 0.5, so gamma · lambda = 0.25.
    # Row 0: δ = 1 + 2 - 2 = 1, 2 + 1 - 4 = -1, 4 + 0 - 2 = 2.
    #        A = 2; -1 + 0.25 · 2 = -0.5; 1 + 0.25 · -0.5 = 0.875.
    # Row 1: δ = 1 + 2 - 2 = 1, 3 + 0 - 4 = -1. A = -1; 1 + 0.25 · -1 = 0.75.
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    assert_close(advantages, torch.tensor([[0.875, -0.5, 2.0], [0.75, -1.0, 0.0]], dtype=torch.float64))
    # Returns: A + V.
    assert_close(returns, torch.tensor([[2.875, 3.5, 4.0], [2.75, 3.0, 0.0]], dtype=torch.float64))
    # Row 1 cut off, with value 8 after its last token: δ_1 = 3 + 0.5 · 8 - 4 = 3. A = 3; 1 + 0.25 · 3 = 1.75.
    bootstrap_value = torch.tensor([0.0, 8.0], dtype=torch.float64)
    advantages, _ = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5, bootstrap_value=bootstrap_value)
    assert_close(advantages, torch.tensor([[0.875, -0.5, 2.0], [1.75, 3.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.0, 0.5), (0.9, 0.0)])
def test_equals_the_double_sum(gamma, gae_lambda):
    rewards, values, mask, bootstrap_value = random_case()
    expected = gae_by_definition(rewards, values, mask, gamma, gae_lambda, torch.zeros(4))
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    assert_close(advantages, expected)
    assert_close(returns, torch.where(mask, expected + values, 0.0))
    expected = gae_by_definition(rewards, values, mask, gamma, gae_lambda, bootstrap_value)
    assert_close(gae(rewards, values, mask, gamma, gae_lambda, bootstrap_value).advantages, expected)


def test_lambda_1_is_the_return_less_the_value():
    rewards, values, mask, _ = random_case()
    estimate = gae(rewards, values, mask, gamma=0.9, gae_lambda=1.0)
    for i, length in enumerate(LENGTHS):
        discounted = [sum(0.9 ** (k - t) * rewards[i, k] for k in range(t, length)) for t in range(length)]
        assert_close(estimate.returns[i, :length], torch.stack(discounted))
        assert_close(estimate.advantages[i, :length], torch.stack(discounted) - values[i, :length])


def test_lambda_0_is_the_td_error():
    rewards, values, mask, bootstrap_value = random_case()
    advantages = gae(rewards, values, mask, 0.9, 0.0, bootstrap_value).advantages
    for i, length in enumerate(LENGTHS):
        expected = td_errors(rewards[i, :length], values[i, :length], 0.9, bootstrap_value[i])
        assert_close(advantages[i, :length], torch.stack(expected))


def test_perfect_values_leave_no_advantage():
    _, _, mask, _ = random_case()
    # Reward 1 per token and no discount: the value is the number of tokens left.
    values = mask.double().flip(1).cumsum(1).flip(1)
    advantages, returns = gae(mask.double(), values, mask, gamma=1.0, gae_lambda=0.95)
    assert_close(advantages, torch.zeros_like(values))
    assert_close(returns, values)


def test_a_bootstrap_value_of_0_is_an_end():
    rewards, values, mask, _ = random_case()
    ended = gae(rewards, values, mask, 1.0, 0.95)
    assert_close(gae(rewards, values, mask, 1.0, 0.95, bootstrap_value=torch.zeros(4)), ended)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e300])
def test_garbage_under_the_mask_changes_neither_value_nor_gradient(garbage):
    rewards, values, mask, bootstrap_value = random_case()

    def results(fill):
        inputs = [x.masked_fill(~mask, fill).requires_grad_() for x in (rewards, values)]
        estimate = gae(*inputs, mask, 0.9, 0.8, bootstrap_value)
        (estimate.advantages.square() + estimate.returns).sum().backward()
        return estimate.advantages.detach(), estimate.returns.detach(), inputs[0].grad, inputs[1].grad

    for actual, expected in zip(results(garbage), results(0.0), strict=True):
        assert_close(actual, expected)
        assert not actual[~mask].any()


def test_padding_on_either_side_changes_nothing():
    rewards, values, mask, bootstrap_value = random_case()
    expected = gae(rewards, values, mask, 0.9, 0.8, bootstrap_value)
    junk, nothing = torch.full((4, 2), math.nan, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.bool)
    right = [torch.cat([x, pad], 1) for x, pad in [(rewards, junk), (values, junk), (mask, nothing)]]
    left = [torch.cat([pad, x], 1) for x, pad in [(rewards, junk), (values, junk), (mask, nothing)]]
    for actual, wanted in zip(gae(*right, 0.9, 0.8, bootstrap_value), expected, strict=True):
        assert_close(actual[:, :-2], wanted)
    for actual, wanted in zip(gae(*left, 0.9, 0.8, bootstrap_value), expected, strict=True):
        assert_close(actual[:, 2:], wanted)


def test_skipped_tokens_in_the_middle_are_as_if_cut_out():
    rewards, values, _, _ = random_case()
    mask = torch.tensor([True, True, False, True, False, True]).expand(4, 6)
    holes = gae(rewards, values, mask, 0.9, 0.8).advantages
    dense = gae_by_definition(
        rewards[:, mask[0]], values[:, mask[0]], torch.ones(4, 4, dtype=torch.bool), 0.9, 0.8, torch.zeros(4)
    )
    assert_close(holes[:, mask[0]], dense)
    assert not holes[:, ~mask[0]].any()


def test_arguments_are_not_written_into_and_half_becomes_float32():
    rewards, values, mask, _ = random_case()
    before = rewards.clone(), values.clone(), mask.clone()
    gae(rewards, values, mask, 1.0, 0.95)
    assert all(torch.equal(now, then) for now, then in zip((rewards, values, mask), before, strict=True))
    estimate = gae(rewards.bfloat16(), values.bfloat16(), mask, 1.0, 0.95)
    assert estimate.advantages.dtype == estimate.returns.dtype == torch.float32


def test_wrong_shapes_are_refused():
    rewards, values, mask, bootstrap_value = random_case()
    with pytest.raises(ValueError, match=r"`values` must have the shape of `rewards`, \(4, 6\), but has \(4, 5\)"):
        gae(rewards, values[:, 1:], mask, 1.0, 0.95)
    with pytest.raises(ValueError, match=r"`bootstrap_value` must have one entry per row of `values`"):
        gae(rewards, values, mask, 1.0, 0.95, bootstrap_value[:2])
    with pytest.raises(ValueError, match="`mask` must be a bool tensor"):
        gae(rewards, values, mask.long(), 1.0, 0.95)
