"""Ratings with different numbers of raters, against numpy and scipy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.testing import assert_close

from lightning_rlhf.functional import mean_rating, median_rating, preference_matrix, trimmed_mean_rating

RATINGS = torch.tensor([[5.0, 1.0, 2.0, 4.0], [9.0, 3.0, 1.0, 7.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, True], [False, True, True, True]])
FUNCTIONS = [
    mean_rating,
    median_rating,
    lambda ratings, mask: trimmed_mean_rating(ratings, mask, 0.3),
    preference_matrix,
]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_case():
    """Ten texts with 1 to 10 ratings from 1 to 5, so that many tie, scattered over the columns."""
    generator = torch.Generator().manual_seed(0)
    ratings = torch.randint(1, 6, (10, 12), generator=generator).double()
    order = torch.rand(10, 12, generator=generator).argsort(1)
    return ratings, order < torch.arange(1, 11).unsqueeze(1)


def by_row(function, ratings, mask):
    return double(*(function(row[counts].numpy()) for row, counts in zip(ratings, mask, strict=True)))


def test_golden():
    # Row 0: 1, 2, 4, 5. Row 1: 1, 3, 7 (the 9 does not count).
    assert_close(mean_rating(RATINGS, MASK), double(3, 11 / 3))
    assert_close(median_rating(RATINGS, MASK), double(3, 3))
    # 25% of 4 is 1: 2 and 4 stay. 25% of 3 is 0.75, nothing goes.
    assert_close(trimmed_mean_rating(RATINGS, MASK, trim=0.25), double(3, 11 / 3))
    # 40% of 4 is 1.6, of 3 is 1.2: one goes at each end of both. 2, 4; 3.
    assert_close(trimmed_mean_rating(RATINGS, MASK, trim=0.4), double(3, 3))


def test_preference_matrix_golden():
    # Against row 1 (1, 3, 7), rating 1 ties once: ½; 2 wins 1; 4 wins 2; 5 wins 2: 5.5 of 12 pairs.
    expected = double([0.5, 5.5 / 12], [6.5 / 12, 0.5])
    assert_close(preference_matrix(RATINGS, MASK), expected)


def test_mean_and_median_equal_numpy():
    ratings, mask = random_case()
    assert_close(mean_rating(ratings, mask), by_row(np.mean, ratings, mask))
    assert_close(median_rating(ratings, mask), by_row(np.median, ratings, mask))


@pytest.mark.parametrize("trim", [0.0, 0.1, 0.25, 0.3, 0.49])
def test_trimmed_mean_equals_scipy(trim):
    ratings, mask = random_case()
    expected = by_row(lambda row: scipy.stats.trim_mean(row, trim), ratings, mask)
    assert_close(trimmed_mean_rating(ratings, mask, trim), expected)


def test_preference_matrix_equals_all_pairs():
    ratings, mask = random_case()
    texts = [row[counts].tolist() for row, counts in zip(ratings, mask, strict=True)]
    expected = [
        [np.mean([(a > b) + 0.5 * (a == b) for a in first for b in second]) for second in texts] for first in texts
    ]
    assert_close(preference_matrix(ratings, mask), double(*expected))


def test_preference_matrix_is_the_mann_whitney_statistic():
    ratings, mask = random_case()
    first, second = ratings[8][mask[8]].numpy(), ratings[9][mask[9]].numpy()
    statistic = scipy.stats.mannwhitneyu(first, second, method="asymptotic").statistic
    assert_close(preference_matrix(ratings, mask)[8, 9].item(), statistic / (len(first) * len(second)))


def test_preferences_of_both_orders_sum_to_1():
    preferences = preference_matrix(*random_case())
    assert_close(preferences + preferences.T, torch.ones(10, 10, dtype=torch.float64))
    assert_close(preferences.diagonal(), torch.full((10,), 0.5, dtype=torch.float64))


def test_trim_0_is_the_mean_and_one_rater_is_always_right():
    ratings, mask = random_case()
    assert_close(trimmed_mean_rating(ratings, mask, trim=0.0), mean_rating(ratings, mask))
    only = torch.tensor([[False, False, True]])
    for rating in (mean_rating, median_rating, lambda r, m: trimmed_mean_rating(r, m, 0.4)):
        assert rating(torch.tensor([[1.0, 2.0, 4.0]]), only).tolist() == [4]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300])
def test_garbage_under_the_mask_changes_neither_value_nor_gradient(function, garbage):
    ratings, mask = random_case()
    leaf = ratings.masked_fill(~mask, garbage).requires_grad_()
    actual = function(leaf, mask)
    assert_close(actual.detach(), function(ratings, mask))
    if function is not preference_matrix:  # which has no gradient
        actual.sum().backward()
        assert_close(leaf.grad.sum(1), torch.ones(10, dtype=torch.float64))  # each row is a weighted mean
        assert not leaf.grad[~mask].any()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_order_and_appended_columns_do_not_matter(function):
    ratings, mask = random_case()
    expected = function(ratings, mask)
    assert_close(function(ratings.flip(1), mask.flip(1)), expected)
    ratings = torch.cat([ratings, torch.full((10, 3), math.nan)], dim=1)
    assert_close(function(ratings, torch.cat([mask, torch.zeros(10, 3, dtype=torch.bool)], dim=1)), expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_integers_and_half_precision_become_float32(function):
    ratings, mask = random_case()
    expected = function(ratings.float(), mask)
    assert_close(function(ratings.long(), mask), expected)
    assert_close(function(ratings.bfloat16(), mask), expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_arguments_are_refused(function):
    with pytest.raises(ValueError, match=r"`mask` must give every text at least one rater, but row 1 has none"):
        function(RATINGS, torch.tensor([[True] * 4, [False] * 4]))
    with pytest.raises(ValueError, match=r"`mask` must have the shape of `ratings`, \(2, 4\), but has \(1, 4\)"):
        function(RATINGS, MASK[:1])


@pytest.mark.parametrize("trim", [-0.1, 0.5])
def test_trim_must_leave_something(trim):
    with pytest.raises(ValueError, match="`trim` must be at least 0 and less"):
        trimmed_mean_rating(RATINGS, MASK, trim)
