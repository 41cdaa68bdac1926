"""Whitening and the statistics under it: golden values, slow versions, two ranks in one process."""

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.functional import (
    masked_mean,
    masked_mean_and_var,
    scale_to_unit_variance,
    whiten,
)

X = torch.tensor([[1.0, 2.0, 6.0], [3.0, 9.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, False, False]])


def random_case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 7, generator=generator, dtype=torch.float64) * 3 + 5
    mask = torch.rand(4, 7, generator=generator) < 0.6
    return x, mask


def test_an_empty_mask_has_mean_0_and_variance_0():
    nothing = torch.zeros_like(MASK)
    assert masked_mean(X, nothing).item() == 0
    assert masked_mean(X, nothing, dim=1).tolist() == [0, 0]
    assert [statistic.item() for statistic in masked_mean_and_var(X, nothing)] == [0, 0]
    assert whiten(X, nothing).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_masked_mean_and_var_golden():
    # Counted 1, 2, 6, 3: mean 3, squared deviations 4 + 1 + 9 + 0 = 14, biased variance 14 / 4 = 3.5.
    mean, var = masked_mean_and_var(X, MASK)
    assert (mean.item(), var.item()) == (3, 3.5)


def test_variance_survives_a_large_mean():
    # 9999.5 ± 0.5 in float32: the mean of squares has no digit left for the variance 0.25.
    x = torch.tensor([9999.0, 10000.0, 9999.0, 10000.0])
    _, var = masked_mean_and_var(x, torch.ones(4, dtype=torch.bool))
    assert var.item() == 0.25


def test_whiten_golden():
    # Mean 3, variance 3.5, eps 0.5: (x - 3) / 2.
    expected = torch.tensor([[-1.0, -0.5, 1.5], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(whiten(X, MASK, eps=0.5), expected)


def test_scale_to_unit_variance_golden():
    # As above plus the mean 3 where it counts, 0 elsewhere.
    expected = torch.tensor([[2.0, 2.5, 4.5], [3.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(scale_to_unit_variance(X, MASK, eps=0.5), expected)


def test_whitening_equals_indexing():
    x, mask = random_case()
    counted = x[mask]
    scale = (counted.var(correction=0) + 1e-8).sqrt()
    assert_close(whiten(x, mask)[mask], (counted - counted.mean()) / scale)
    assert_close(scale_to_unit_variance(x, mask)[mask], (counted - counted.mean()) / scale + counted.mean())


def test_whitened_has_mean_0_and_scaled_keeps_the_mean():
    x, mask = random_case()
    assert_close(whiten(x, mask)[mask].mean(), torch.tensor(0.0, dtype=torch.float64))
    assert_close(scale_to_unit_variance(x, mask)[mask].mean(), x[mask].mean())
    # eps=0, or the standard deviation would fall short of 1 by eps / 2.
    for function in (whiten, scale_to_unit_variance):
        assert_close(function(x, mask, eps=0.0)[mask].std(correction=0), torch.tensor(1.0, dtype=torch.float64))


def test_constant_input_whitens_to_0():
    assert whiten(torch.full((2, 3), 7.0), MASK).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("function", [whiten, scale_to_unit_variance])
def test_two_ranks_whiten_like_one(function):
    (x, mask), (other_x, other_mask) = random_case(1), random_case(2)
    whole = function(torch.cat([x, other_x]), torch.cat([mask, other_mask]))

    # What the other rank sends: its sum and count, then its squared deviations from the mean of both.
    counted = other_x[other_mask]
    mean = torch.cat([x[mask], counted]).mean()
    other_rank = iter([torch.stack([counted.sum(), other_mask.sum().double()]), (counted - mean).square().sum()])
    assert_close(function(x, mask, reduce=lambda ours: ours + next(other_rank)), whole[: len(x)])
    assert next(other_rank, None) is None
