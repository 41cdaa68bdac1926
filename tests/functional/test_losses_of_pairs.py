"""Bradley-Terry losses, hard and soft: worked numbers, torch's cross-entropies, limits."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.functional import (
    bradley_terry_loss,
    masked_mean,
    soft_bradley_terry_loss,
)

MASK = torch.tensor([True, False, True])


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_tensors(number, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(number, 12, generator=generator, dtype=torch.float64)


def test_bradley_terry_loss_golden():
    # σ(0) = ½: log 2. σ(log 3) = 3/4: log 4/3. With margin log 3 the second is σ(0) again.
    chosen, rejected = double(1, math.log(3) + 5), double(1, 5)
    assert_close(bradley_terry_loss(chosen, rejected), double(math.log(2), math.log(4 / 3)))
    margin = double(0, math.log(3))
    assert_close(bradley_terry_loss(chosen, rejected, margin), double(math.log(2), math.log(2)))


def test_bradley_terry_loss_is_a_two_way_cross_entropy():
    chosen, rejected, margin = random_tensors(3, scale=3)
    first = torch.zeros(12, dtype=torch.long)
    expected = torch.nn.functional.cross_entropy(torch.stack([chosen, rejected], 1), first, reduction="none")
    assert_close(bradley_terry_loss(chosen, rejected), expected)
    both = torch.stack([chosen, rejected + margin], 1)
    expected = torch.nn.functional.cross_entropy(both, first, reduction="none")
    assert_close(bradley_terry_loss(chosen, rejected, margin), expected)


def test_bradley_terry_probabilities_of_both_orders_sum_to_1():
    chosen, rejected = random_tensors(2, scale=3)
    total = (-bradley_terry_loss(chosen, rejected)).exp() + (-bradley_terry_loss(rejected, chosen)).exp()
    assert_close(total, torch.ones(12, dtype=torch.float64))


def test_bradley_terry_loss_is_finite_for_any_score():
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(2))
    loss.sum().backward()
    assert loss.tolist() == [0, 1e4]
    assert chosen.grad.tolist() == [0, -1]


def test_soft_bradley_terry_loss_golden():
    # d = log 3, so σ = 3/4: p = 1: log 4/3; p = 0: log 4; p = ½: half of each, ½ log 16/3.
    difference = double(math.log(3), math.log(3), math.log(3))
    expected = double(math.log(4 / 3), math.log(4), 0.5 * math.log(16 / 3))
    assert_close(soft_bradley_terry_loss(difference, double(1, 0, 0.5)), expected)
    # A margin of log 3 leaves d = 0: log 2 for every p.
    assert_close(soft_bradley_terry_loss(difference, double(1, 0, 0.5), margin=difference), double(*[math.log(2)] * 3))


def test_soft_bradley_terry_loss_equals_binary_cross_entropy():
    difference, preference, margin = random_tensors(3, scale=3)
    preference = preference.sigmoid()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(difference, preference, reduction="none")
    assert_close(soft_bradley_terry_loss(difference, preference), expected)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(difference - margin, preference, reduction="none")
    assert_close(soft_bradley_terry_loss(difference, preference, margin), expected)


def test_soft_bradley_terry_loss_at_preference_1_is_the_hard_one():
    chosen, rejected, margin = random_tensors(3)
    soft = soft_bradley_terry_loss(chosen - rejected, torch.ones_like(chosen), margin)
    assert_close(soft, bradley_terry_loss(chosen, rejected, margin))


def test_soft_bradley_terry_loss_is_least_at_the_preference():
    preference = double(0.1, 0.5, 0.8)
    difference = preference.logit().requires_grad_()
    soft_bradley_terry_loss(difference, preference).sum().backward()
    assert_close(difference.grad, double(0, 0, 0))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e6])
def test_garbage_in_pairs_that_do_not_count_changes_neither_value_nor_gradient(garbage):
    def value_and_gradient(fill):
        chosen = double(0.3, fill, 2).requires_grad_()
        value = masked_mean(bradley_terry_loss(chosen, double(1, 0, -1)), MASK)
        value = value + masked_mean(soft_bradley_terry_loss(chosen, double(0.7, 0.5, 0.2)), MASK)
        value.backward()
        return value.detach(), chosen.grad[MASK]

    for actual, expected in zip(value_and_gradient(garbage), value_and_gradient(0.0), strict=True):
        assert_close(actual, expected)


def test_half_precision_gives_float32():
    a, b, c = random_tensors(3).bfloat16()
    assert bradley_terry_loss(a, b, c).dtype == soft_bradley_terry_loss(a, b.sigmoid(), c).dtype == torch.float32


def test_wrong_shapes_are_refused():
    x, short = torch.zeros(2, 3), torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"`rejected` must have the shape of `chosen`, \(2, 3\), but has \(2, 1\)"):
        bradley_terry_loss(x, short)
    with pytest.raises(ValueError, match="`margin`"):
        bradley_terry_loss(x, x, short)
    with pytest.raises(ValueError, match="`preference`"):
        soft_bradley_terry_loss(x, short)
