import math

import pytest
import torch

from lightning_rlhf.functional import bootstrap_interval, correlation, wins


def test_correlation_by_hand():
    # deviations −1, 0, 1 and −2, 1, 1: 3 / √(2 · 6)
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 5.0, 5.0])
    assert correlation(x, y).item() == pytest.approx(3 / math.sqrt(12))
    assert correlation(x, -y).item() == pytest.approx(-3 / math.sqrt(12))


def test_correlation_knows_no_scale_and_no_shift():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    expected = correlation(x, y).item()
    assert correlation(3 * x - 7, 0.5 * y + 1e3).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_correlation_with_a_constant_is_not_defined(constant):
    x = torch.tensor([1.0, 2.0, 4.0])
    assert correlation(x, torch.full((3,), constant)).isnan()
    assert correlation(torch.full((3,), constant), x).isnan()


def test_correlation_of_different_lengths_is_refused():
    with pytest.raises(ValueError, match=r"`x` and `y` must have the same shape, but got \(2,\) and \(3,\)"):
        correlation(torch.zeros(2), torch.zeros(3))


def test_ties_are_half_a_win():
    assert wins(torch.tensor([3.0, 1.0, 1.0, -2.0]), torch.tensor([1.0, 3.0, 1.0, -5.0])).tolist() == [1, 0, 0.5, 1]


def test_the_interval_of_a_coin_is_the_binomials():
    n, share = 400, 0.3
    values = (torch.arange(n) < share * n).double()
    low, high = bootstrap_interval(values, resamples=5000)
    width = 1.96 * math.sqrt(share * (1 - share) / n)  # the normal limit
    assert low == pytest.approx(share - width, abs=0.006)
    assert high == pytest.approx(share + width, abs=0.006)


def test_a_wider_level_is_a_wider_interval():
    values = torch.arange(20.0)
    low, high = bootstrap_interval(values, level=0.5)
    lower, higher = bootstrap_interval(values, level=0.99)
    assert lower < low < values.mean() < high < higher


def test_the_bootstrap_draws_from_a_generator_of_its_own():
    before = torch.get_rng_state()
    values = torch.arange(10.0)
    first = bootstrap_interval(values)
    assert torch.equal(torch.get_rng_state(), before)
    assert bootstrap_interval(values) == first
    assert bootstrap_interval(values, seed=1) != first
    assert bootstrap_interval(values, resamples=50) != first
