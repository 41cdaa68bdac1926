"""Advantages within groups, against loops and by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.functional import (
    group_centered,
    group_normalized,
    grouped,
    has_spread,
    leave_one_out,
    returns_to_go,
)

SCORES = torch.tensor([1.0, 2.0, 6.0, 0.5, -4.0, 2.0], dtype=torch.float64)  # two groups of three
RELATIVE = [group_centered, group_normalized, leave_one_out]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def loop(scores, size, function):
    rows = scores.tolist()
    return double(*(function(rows[i // size * size : i // size * size + size], i % size) for i in range(len(rows))))


def test_golden():
    # Means 3 and -0.5; deviations with n - 1: √((4 + 1 + 9) / 2) = √7, √((1 + 12.25 + 6.25) / 2) = √9.75.
    centered = double(-2, -1, 3, 1, -3.5, 2.5)
    assert_close(group_centered(SCORES, 3), centered)
    deviations = double(7, 7, 7, 9.75, 9.75, 9.75).sqrt()
    assert_close(group_normalized(SCORES, 3, eps=0.5), centered / (deviations + 0.5))
    # Against the mean of the other two: 1 - 4, 2 - 3.5, 6 - 1.5, 0.5 + 1, -4 - 1.25, 2 + 1.75.
    assert_close(leave_one_out(SCORES, 3), double(-3, -1.5, 4.5, 1.5, -5.25, 3.75))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_they_equal_their_definitions_written_as_loops(size):
    scores = torch.randn(16, generator=torch.Generator().manual_seed(size), dtype=torch.float64)

    def without_itself(group, i):
        others = [x for j, x in enumerate(group) if j != i]
        return group[i] - sum(others) / len(others)

    def in_deviations(group, i):
        mean = sum(group) / len(group)
        variance = sum((x - mean) ** 2 for x in group) / (len(group) - 1)
        return (group[i] - mean) / (math.sqrt(variance) + 1e-4)

    assert_close(leave_one_out(scores, size), loop(scores, size, without_itself))
    assert_close(group_normalized(scores, size), loop(scores, size, in_deviations))
    assert_close(group_centered(scores, size), loop(scores, size, lambda g, i: g[i] - sum(g) / len(g)))


@pytest.mark.parametrize("function", RELATIVE)
def test_they_sum_to_zero_in_each_group_and_ignore_a_shift(function):
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages = function(scores, 4)
    assert_close(advantages.view(3, 4).sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert advantages.abs().max() > 0.1
    shift = torch.arange(3, dtype=torch.float64).repeat_interleave(4) * 10
    assert_close(function(scores + shift, 4), advantages)


def test_normalised_ones_ignore_a_scale_and_centered_ones_do_not():
    assert_close(group_normalized(SCORES * 7, 3, eps=1e-12), group_normalized(SCORES, 3, eps=1e-12))
    assert_close(group_centered(SCORES * 7, 3), group_centered(SCORES, 3) * 7)


@pytest.mark.parametrize("function", RELATIVE)
def test_equal_rewards_give_no_advantage(function):
    assert torch.equal(function(torch.ones(6), 3), torch.zeros(6))


def test_leave_one_out_gives_the_policy_gradient_of_reinforce_without_bias():
    """Over all groups of two from a known policy, Σ p(i) p(j) ½ (A_i ∇log p_i + A_j ∇log p_j) = ∇ E[R]."""
    logits = double(0.3, -0.2, 1.0).requires_grad_()
    rewards = double(1.0, 5.0, -2.0)
    p = logits.softmax(0)
    (expected,) = torch.autograd.grad((p * rewards).sum(), logits, retain_graph=True)
    estimate = torch.zeros(3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            advantages = leave_one_out(rewards[[i, j]], 2)
            objective = (advantages * p.log()[[i, j]]).mean()
            (gradient,) = torch.autograd.grad(objective, logits, retain_graph=True)
            estimate += (p[i] * p[j]).detach() * gradient
    assert_close(estimate, expected)


def test_spread():
    assert has_spread(SCORES, 3).tolist() == [True, True]
    assert has_spread(torch.tensor([1.0, 1.0, 2.0, 2.5]), 2).tolist() == [False, True]


@pytest.mark.parametrize("function", [*RELATIVE, grouped, has_spread])
def test_groups_must_be_whole_and_have_members(function):
    with pytest.raises(ValueError, match=r"`group_size` must be at least 2 .* is 1"):
        function(SCORES, 1)
    with pytest.raises(ValueError, match=r"B a multiple of group_size=4, but is \(6,\)"):
        function(SCORES, 4)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_to_go_equal_a_loop(gamma):
    rewards = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lengths = [5, 1, 3]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    expected = torch.zeros_like(rewards)
    for i, length in enumerate(lengths):
        for t in range(length):
            expected[i, t] = sum(gamma ** (k - t) * rewards[i, k] for k in range(t, length))
    assert_close(returns_to_go(rewards.masked_fill(~mask, torch.nan), mask, gamma), expected)
