"""Drawing by inversion, against a loop over exact fractions."""

from fractions import Fraction

import pytest
import torch

from lightning_rlhf.functional import invert_cdf

ALMOST_1 = 1 - 2**-53


def slow(weights: list[float], uniform: float) -> int:
    exact = [Fraction(weight) for weight in weights]
    target, passed = Fraction(uniform) * sum(exact), Fraction(0)
    for token, weight in enumerate(exact):
        passed += weight
        if passed > target:
            return token
    raise AssertionError("uniform is below 1")


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 600, 1024])
def test_it_is_the_first_token_beyond_the_number(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    # Of few digits, so that every sum is exact, and with many zeros.
    p = torch.randint(0, 4, (50, vocabulary), generator=generator).float() / 8
    p[:, vocabulary // 2] += 0.125
    uniform = torch.rand(50, 1, generator=generator, dtype=torch.float64)
    uniform[:3, 0] = torch.tensor([0.0, ALMOST_1, 0.5], dtype=torch.float64)
    found = invert_cdf(p, uniform)
    assert found.shape == (50, 1)
    assert found[:, 0].tolist() == [slow(row, u) for row, u in zip(p.tolist(), uniform[:, 0].tolist(), strict=True)]


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.999999, ALMOST_1])
@pytest.mark.parametrize("only", [0, 1, 255, 256, 700])
def test_what_has_no_probability_never_comes(uniform, only):
    p = torch.zeros(1, 701)
    p[0, only] = 0.1  # with a sum that is no power of two
    assert invert_cdf(p, torch.tensor([[uniform]]).double()).item() == only


def test_rounding_at_the_end_stays_within_what_has_probability():
    p = torch.rand(2000, 1000, generator=torch.Generator().manual_seed(0)).softmax(-1)
    p[:, 900:] = 0
    assert invert_cdf(p, torch.full((2000, 1), ALMOST_1, dtype=torch.float64)).max() <= 899
    assert invert_cdf(p, torch.zeros(2000, 1, dtype=torch.float64)).max() == 0


def test_many_draws_have_the_distribution():
    p = torch.tensor([0.5, 0.0, 0.25, 0.25]).repeat_interleave(200) / 200  # over several blocks
    draws = 200_000
    uniform = (torch.arange(draws).double()[:, None] + 0.5) / draws
    counts = torch.bincount(invert_cdf(p.expand(draws, -1), uniform)[:, 0], minlength=800)
    torch.testing.assert_close(counts / draws, p, rtol=0, atol=1e-5)
