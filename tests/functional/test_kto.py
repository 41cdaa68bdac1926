"""KTO: worked numbers, the equations in loops, limits, gradients, the reference point over ranks."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.functional import bradley_terry_loss, kto_loss, kto_reference_point

LOG3 = math.log(3)  # σ(log 3) = 3/4


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_loss_golden():
    # β (u − z) is 0, log 3, −log 3: σ is 1/2, 3/4, 1/4.
    log_ratio = double(2, 2 + 10 * LOG3, 2 - 10 * LOG3)
    good, bad = torch.tensor([True] * 3), torch.tensor([False] * 3)
    assert_close(kto_loss(log_ratio, good, double(2).squeeze(), beta=0.1), double(1 / 2, 1 / 4, 3 / 4))
    assert_close(kto_loss(log_ratio, bad, double(2).squeeze(), beta=0.1), double(1 / 2, 3 / 4, 1 / 4))
    # Half the β: β (u − z) = ±log(3) / 2, and σ is √3 / (1 + √3).
    root = math.sqrt(3)
    expected = double(1 / 2, 1 / (1 + root), root / (1 + root))
    assert_close(kto_loss(log_ratio, good, double(2).squeeze(), beta=0.05), expected)


def test_each_kind_has_its_weight():
    log_ratio, kinds = double(10 * LOG3, 10 * LOG3), torch.tensor([True, False])
    found = kto_loss(log_ratio, kinds, torch.tensor(0.0), beta=0.1, desirable_weight=4.0, undesirable_weight=2.0)
    assert_close(found, double(4 * 1 / 4, 2 * 3 / 4))


def test_loss_equals_the_papers_equations_one_by_one():
    generator = torch.Generator().manual_seed(0)
    log_ratio = 20 * torch.randn(50, generator=generator, dtype=torch.float64)
    kinds = torch.rand(50, generator=generator) < 0.4
    beta, z, good, bad = 0.3, 1.7, 1.2, 0.8
    expected = []
    for u, desirable in zip(log_ratio.tolist(), kinds.tolist(), strict=True):
        x = beta * (u - z) if desirable else beta * (z - u)
        value = 1 / (1 + math.exp(-x))
        expected.append((good if desirable else bad) * (1 - value))
    assert 5 < kinds.sum() < 45
    assert_close(kto_loss(log_ratio, kinds, torch.tensor(z, dtype=torch.float64), beta, good, bad), double(*expected))


def test_it_is_one_minus_the_probability_of_winning_against_z():
    log_ratio, z, beta = double(-3, 0.5, 8), torch.tensor(1.25, dtype=torch.float64), 0.7
    wins = (-bradley_terry_loss(beta * log_ratio, beta * z.expand(3))).exp()
    assert_close(kto_loss(log_ratio, torch.tensor([True] * 3), z, beta), 1 - wins)
    assert_close(kto_loss(log_ratio, torch.tensor([False] * 3), z, beta), wins)


def test_gradients_push_good_up_and_bad_down_and_most_at_the_reference_point():
    z, beta = 1.0, 0.5
    log_ratio = double(*[z - 20, z - 1, z, z + 1, z + 20] * 2).requires_grad_()
    kinds = torch.tensor([True] * 5 + [False] * 5)
    kto_loss(log_ratio, kinds, torch.tensor(z), beta, desirable_weight=2.0, undesirable_weight=3.0).sum().backward()
    good, bad = log_ratio.grad.chunk(2)
    assert (good < 0).all()
    assert (bad > 0).all()
    assert_close(good[2], double(-2 * beta / 4).squeeze())  # σ' = 1/4 at 0
    assert_close(bad[2], double(3 * beta / 4).squeeze())
    assert_close(good / -2, bad / 3)
    assert_close(good, good.flip(0))
    assert good[0].abs() < good[1].abs() < good[2].abs()


def test_no_gradient_flows_into_the_reference_point():
    log_ratio, z = double(1, 2).requires_grad_(), torch.tensor(0.5, requires_grad=True)
    kto_loss(log_ratio, torch.tensor([True, False]), z, 0.1).sum().backward()
    assert z.grad is None
    assert log_ratio.grad.abs().min() > 0


def test_a_small_loss_keeps_its_digits_and_a_large_ratio_stays_finite():
    log_ratio = torch.tensor([60.0, 1e6, -1e6], requires_grad=True)
    loss = kto_loss(log_ratio, torch.tensor([True, True, True]), torch.tensor(0.0), beta=1.0)
    assert loss[0].item() == pytest.approx(math.exp(-60), rel=1e-5, abs=0)  # 1 − σ(60) would be 0 in float32
    assert loss[1:].tolist() == [0, 1]
    loss.sum().backward()
    assert log_ratio.grad.isfinite().all()


def test_reference_point_golden():
    log_ratio = double(3, -1, 4, 100)
    mask = torch.tensor([True, True, True, False])
    assert_close(kto_reference_point(log_ratio, mask), double(2).squeeze())
    assert_close(kto_reference_point(-log_ratio, mask), double(0).squeeze())  # −2, but a KL is never negative
    # Only the mean is cut off, not its terms.
    assert_close(kto_reference_point(double(3, -1), torch.tensor([True, True])), double(1).squeeze())


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_does_not_count_may_be_anything(garbage):
    found = kto_reference_point(double(2, garbage), torch.tensor([True, False]))
    assert_close(found, double(2).squeeze())


def test_reference_point_of_nothing_is_0():
    assert kto_reference_point(torch.tensor([5.0]), torch.tensor([False])).item() == 0


def test_reference_point_is_of_all_ranks():
    """Ranks with unequal numbers of completions: the mean is over completions, and is cut off after the sum."""
    parts = [(double(6, 5, 4), torch.tensor([True] * 3)), (double(-9, 7), torch.tensor([True, False]))]
    sums = []
    for log_ratio, mask in parts:
        kto_reference_point(log_ratio, mask, lambda x: sums.append(x) or x)
    for log_ratio, mask in parts:
        found = kto_reference_point(log_ratio, mask, lambda x: sum(sums))
        assert_close(found, double((6 + 5 + 4 - 9) / 4).squeeze())


def test_reference_point_has_no_gradient():
    log_ratio = double(1, 2).requires_grad_()
    assert not kto_reference_point(log_ratio, torch.tensor([True, True])).requires_grad


def test_half_precision_gives_float32():
    u, kinds = torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([True, False])
    z = kto_reference_point(u, kinds)
    assert z.dtype == kto_loss(u, kinds, z, 0.1).dtype == torch.float32


def test_wrong_arguments_are_refused():
    u, kinds = torch.zeros(2), torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"`desirable` must have the shape of `log_ratio`, \(2,\), but has \(1,\)"):
        kto_loss(u, kinds[:1], torch.tensor(0.0), 0.1)
    with pytest.raises(ValueError, match="`desirable` must be a bool tensor"):
        kto_loss(u, kinds.long(), torch.tensor(0.0), 0.1)
    with pytest.raises(ValueError, match=r"`kl` must be a scalar, one for all completions, but has shape \(2,\)"):
        kto_loss(u, kinds, u, 0.1)
    with pytest.raises(ValueError, match="`mask` must be a bool tensor"):
        kto_reference_point(u, kinds.long())
