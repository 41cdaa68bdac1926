"""Policy and value losses: worked numbers, slow loops, limits, and what lies under the mask."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.functional import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    is_clipped,
    masked_mean,
    sequence_logprobs,
    sequence_mean,
)

MASK = torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, False, False]])


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_tensors(number):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, 3, 4, generator=generator, dtype=torch.float64)


def test_clipped_policy_loss_golden():
    # Ratios 1.5, 1.5, 0.5, 0.5, 1.1 with advantages 2, -2, 2, -2, 2 and clip range 0.2:
    # min(3, 1.2 · 2) = 2.4; min(-3, -2.4) = -3; min(1, 0.8 · 2) = 1; min(-1, -1.6) = -1.6; min(2.2, 2.2) = 2.2.
    logprobs, old_logprobs = double(1.5, 1.5, 0.5, 0.5, 1.1).log() - 3, double(-3, -3, -3, -3, -3)
    actual = clipped_policy_loss(logprobs, old_logprobs, double(2, -2, 2, -2, 2), clip_range=0.2)
    assert_close(actual, double(-2.4, 3, -1, 1.6, -2.2))


def test_clipped_policy_loss_equals_a_loop():
    logprobs, old_logprobs, advantages = random_tensors(3)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for i in range(3):
        for t in range(4):
            ratio, advantage = math.exp(logprobs[i, t] - old_logprobs[i, t]), advantages[i, t].item()
            expected[i, t] = max(-ratio * advantage, -min(max(ratio, 0.7), 1.3) * advantage)
    assert_close(clipped_policy_loss(logprobs, old_logprobs, advantages, clip_range=0.3), expected)


def test_clipped_policy_loss_at_ratio_1_is_minus_the_advantage_with_the_policy_gradient():
    logprobs, advantages = random_tensors(2)
    new_logprobs = logprobs.clone().requires_grad_()
    loss = clipped_policy_loss(new_logprobs, logprobs, advantages, clip_range=0.2)
    loss.sum().backward()
    assert_close(loss.detach(), -advantages)
    assert_close(new_logprobs.grad, -advantages)


def test_clipped_policy_loss_has_no_gradient_only_where_clipping_binds():
    # As in the golden test: the ratio has left the range in the direction of the advantage in tokens 0 and 3 only.
    logprobs = double(1.5, 1.5, 0.5, 0.5).log().requires_grad_()
    clipped_policy_loss(logprobs, double(0, 0, 0, 0), double(2, -2, 2, -2), clip_range=0.2).sum().backward()
    # Elsewhere d(-ratio · A) / d logprob = -ratio · A: 1.5 · 2 = 3 and -0.5 · 2 = -1.
    assert_close(logprobs.grad, double(0, 3, -1, 0))


def test_an_infinite_clip_range_does_not_clip():
    logprobs, old_logprobs, advantages = random_tensors(3)
    actual = clipped_policy_loss(logprobs, old_logprobs, advantages, clip_range=math.inf)
    assert_close(actual, -(logprobs - old_logprobs).exp() * advantages)


def test_extreme_log_ratios_stay_finite():
    logprobs = torch.tensor([500.0, -500.0, -math.inf], requires_grad=True)
    loss = clipped_policy_loss(logprobs, torch.zeros(3), -torch.ones(3), clip_range=0.2)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logprobs.grad.isfinite().all()


def test_is_clipped_golden():
    # Ratios 1.5, 1.19, 0.81, 0.79, 1 with clip range 0.2.
    actual = is_clipped(double(1.5, 1.19, 0.81, 0.79, 1).log() - 2, double(-2, -2, -2, -2, -2), clip_range=0.2)
    assert_close(actual, double(1, 0, 0, 1, 0))


def test_is_clipped_equals_a_loop_and_its_limits():
    logprobs, old_logprobs = random_tensors(2)
    ratios = [[math.exp(d) for d in row] for row in (logprobs - old_logprobs).tolist()]
    expected = [[float(ratio < 0.7 or ratio > 1.3) for ratio in row] for row in ratios]
    assert_close(is_clipped(logprobs, old_logprobs, clip_range=0.3), double(*expected))
    assert not is_clipped(logprobs, logprobs, clip_range=0.2).any()
    assert is_clipped(logprobs, old_logprobs, clip_range=0.0).all()


def test_clipped_value_loss_golden():
    # clip range 0.5. Values 1, 1, 0.25, old values 0; returns 1, -1, 1. Clipped values 0.5, 0.5, 0.25.
    # ½ max(0, 0.25) = 0.125; ½ max(4, 2.25) = 2; ½ max(0.5625, 0.5625) = 0.28125.
    values, old_values, returns = double(1, 1, 0.25), double(0, 0, 0), double(1, -1, 1)
    assert_close(clipped_value_loss(values, old_values, returns, clip_range=0.5), double(0.125, 2, 0.28125))
    # Unclipped: ½ · 0, ½ · 4, ½ · 0.5625.
    assert_close(clipped_value_loss(values, old_values, returns, clip_range=None), double(0, 2, 0.28125))


def test_clipped_value_loss_equals_a_loop():
    values, old_values, returns = random_tensors(3)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for i in range(3):
        for t in range(4):
            value, old, target = values[i, t].item(), old_values[i, t].item(), returns[i, t].item()
            clipped = min(max(value, old - 0.4), old + 0.4)
            expected[i, t] = max((value - target) ** 2, (clipped - target) ** 2) / 2
    assert_close(clipped_value_loss(values, old_values, returns, clip_range=0.4), expected)


def test_clipped_value_loss_without_clipping_or_without_a_move_is_half_the_squared_error():
    values, old_values, returns = random_tensors(3)
    squared_error = torch.nn.functional.mse_loss(values, returns, reduction="none")
    assert_close(clipped_value_loss(values, old_values, returns, clip_range=None), 0.5 * squared_error)
    assert_close(clipped_value_loss(values, old_values, returns, clip_range=1e9), 0.5 * squared_error)
    assert_close(clipped_value_loss(values, values, returns, clip_range=0.2), 0.5 * squared_error)
    leaf = values.clone().requires_grad_()
    clipped_value_loss(leaf, values, returns, clip_range=0.2).sum().backward()
    assert_close(leaf.grad, values - returns)


def test_explained_variance_golden():
    # Returns 1, 3: variance 1. Errors 1 - 1 = 0, 3 - 2 = 1: variance 0.25. 1 - 0.25 / 1 = 0.75. The 9 does not count.
    mask = torch.tensor([True, True, False])
    assert explained_variance(double(1, 2, 9), double(1, 3, 0), mask).item() == 0.75


def test_explained_variance_equals_indexing_and_its_limits():
    values, returns = random_tensors(2)
    error, target = (returns - values)[MASK], returns[MASK]
    expected = 1 - error.var(correction=0) / target.var(correction=0)
    assert_close(explained_variance(values, returns, MASK), expected)
    assert explained_variance(returns, returns, MASK).item() == 1
    assert explained_variance(torch.zeros_like(returns), returns, MASK).item() == 0
    assert_close(explained_variance(2 * returns, returns, MASK), double(0)[0])
    assert explained_variance(values, torch.ones_like(returns), MASK).isnan()


def test_explained_variance_of_two_equal_ranks_is_that_of_one():
    values, returns = random_tensors(2)
    calls = []

    def reduce(x):
        calls.append(x)
        return 2 * x

    assert_close(explained_variance(values, returns, MASK, reduce), explained_variance(values, returns, MASK))
    assert len(calls) == 4


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e6])
def test_garbage_in_the_policy_loss_changes_neither_value_nor_gradient(garbage):
    logprobs, old_logprobs, advantages = random_tensors(3)

    def value_and_gradient(fill):
        leaf = logprobs.masked_fill(~MASK, fill).requires_grad_()
        loss = clipped_policy_loss(leaf, old_logprobs, advantages.masked_fill(~MASK, 0.0), clip_range=0.2)
        clip_fraction = masked_mean(is_clipped(leaf, old_logprobs, clip_range=0.2), MASK)
        value = masked_mean(loss, MASK)
        value.backward()
        return value.detach(), clip_fraction.detach(), leaf.grad

    for actual, expected in zip(value_and_gradient(garbage), value_and_gradient(0.0), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("garbage", [1e6, -1e6])
def test_garbage_in_the_value_loss_changes_neither_value_nor_gradient(garbage):
    # Finite garbage only: see the module's docstring.
    values, old_values, returns = random_tensors(3)

    def value_and_gradient(fill):
        leaf = values.masked_fill(~MASK, fill).requires_grad_()
        inputs = [x.masked_fill(~MASK, fill) for x in (old_values, returns)]
        value = masked_mean(clipped_value_loss(leaf, *inputs, clip_range=0.2), MASK)
        value.backward()
        return value.detach(), leaf.grad

    for actual, expected in zip(value_and_gradient(garbage), value_and_gradient(0.0), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e300])
def test_garbage_in_the_explained_variance_changes_nothing(garbage):
    values, returns = random_tensors(2)
    spoiled = [x.masked_fill(~MASK, garbage) for x in (values, returns)]
    assert_close(explained_variance(*spoiled, MASK), explained_variance(values, returns, MASK))


def test_half_precision_gives_float32():
    a, b, c = random_tensors(3).bfloat16()
    losses = [
        clipped_policy_loss(a, b, c, clip_range=0.2),
        is_clipped(a, b, clip_range=0.2),
        clipped_value_loss(a, b, c, clip_range=0.2),
        explained_variance(a, b, MASK),
    ]
    assert {loss.dtype for loss in losses} == {torch.float32}


def test_wrong_shapes_are_refused():
    x, short = torch.zeros(2, 3), torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"`advantages` must have the shape of `logprobs`, \(2, 3\), but has \(2, 1\)"):
        clipped_policy_loss(x, x, short, clip_range=0.2)
    with pytest.raises(ValueError, match="`old_logprobs`"):
        is_clipped(x, short, clip_range=0.2)
    with pytest.raises(ValueError, match="`returns`"):
        clipped_value_loss(x, x, short, clip_range=0.2)
    with pytest.raises(ValueError, match="`mask`"):
        explained_variance(x, x, short.bool())


def test_clip_higher_golden():
    # Ratios 1.5, 1.5, 0.5, 0.5 with advantages ±2, clipped to [0.8, 1.28]: min of (3, 2.56), (-3, -2.56), (1, 1.6),
    # (-1, -1.6).
    logprobs, old = double(1.5, 1.5, 0.5, 0.5).log(), double(1, 1, 1, 1).log()
    loss = clipped_policy_loss(logprobs, old, double(2, -2, 2, -2), clip_range=0.2, clip_range_high=0.28)
    assert_close(loss, double(-2.56, 3, -1, 1.6))
    assert is_clipped(double(1.25, 1.3, 0.85).log(), double(0, 0, 0), 0.2, 0.28).tolist() == [0, 1, 0]
    assert is_clipped(double(1.25, 1.3, 0.85).log(), double(0, 0, 0), 0.2).tolist() == [1, 1, 0]


def test_sequence_logprobs_make_the_ratio_a_geometric_mean():
    ratios = double(2, 0.5, 4, 7)
    mask = torch.tensor([[True, True, True, False]])
    old = torch.zeros(1, 4, dtype=torch.float64)
    parts = sequence_logprobs(ratios.log()[None], mask), sequence_logprobs(old, mask)
    loss = clipped_policy_loss(*parts, torch.ones(1, 4, dtype=torch.float64), clip_range=9.0)
    assert_close(loss, double(*[-((2 * 0.5 * 4) ** (1 / 3))] * 4)[None])


def test_the_gradient_of_a_sequence_ratio_is_shared_by_its_tokens():
    """∇ s = s · (1 / |o|) Σ_t ∇ log π_t, so at s = 1 each token gets 1 / |o| of the advantage."""
    leaf = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    old = torch.zeros(1, 4, dtype=torch.float64)
    advantages = torch.full((1, 4), 6.0, dtype=torch.float64)
    loss = clipped_policy_loss(sequence_logprobs(leaf, mask), sequence_logprobs(old, mask), advantages, 0.2)
    sequence_mean(loss, mask).total.backward()
    assert_close(leaf.grad, double(-2, -2, -2, 0)[None])
