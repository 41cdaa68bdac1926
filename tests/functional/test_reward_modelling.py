"""Rankings and rating scales: worked numbers, all orders of a list, slow restatements in loops, limits."""

import math
from itertools import pairwise, permutations

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.functional import (
    bradley_terry_loss,
    free_thresholds,
    mean_rating,
    ordered_thresholds,
    ordinal_logprobs,
    ordinal_loss,
    plackett_luce_loss,
    rating_shares,
)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def whole(*lists):
    """A batch of lists of one length, and its mask."""
    return double(*lists), torch.ones(len(lists), len(lists[0]), dtype=torch.bool)


def sigma(x):
    return 1 / (1 + math.exp(-x))


# --- Plackett-Luce ----------------------------------------------------------------------------------------------------


def slow_plackett_luce(scores, ranks):
    """Item by item from the best down; of items that share a rank, Efron's fractions."""
    loss, left = 0.0, list(range(len(scores)))
    for rank in sorted(set(ranks)):
        tied = [i for i in left if ranks[i] == rank]
        for taken, i in enumerate(tied):
            everyone = sum(math.exp(scores[j]) for j in left)
            fraction = taken / len(tied) * sum(math.exp(scores[j]) for j in tied)
            loss += math.log(everyone - fraction) - scores[i]
        left = [i for i in left if i not in tied]
    return loss


def test_plackett_luce_golden():
    # Scores log 1, log 2, log 3; the order is 3, 1, 2: 3/6 · 1/3 · 1.
    scores, mask = whole([0.0, math.log(2), math.log(3)])
    assert_close(plackett_luce_loss(scores, double([2, 3, 1]), mask), double(math.log(6)))
    # The first two tied at the top: (1·2) / (6 · (6 − 3/2)); the last has no choice.
    assert_close(plackett_luce_loss(scores, double([1, 1, 2]), mask), double(math.log(27 / 2)))
    # The first two tied at the bottom: 3/6 · (1·2) / (3 · 3/2).
    assert_close(plackett_luce_loss(scores, double([2, 2, 1]), mask), double(math.log(9 / 2)))


def test_two_items_are_bradley_terry():
    scores, mask = whole([0.3, -1.2], [2.0, 2.5], [-40.0, 60.0])
    expected = bradley_terry_loss(scores[:, 0], scores[:, 1])
    assert_close(plackett_luce_loss(scores, double([1, 2]).expand(3, 2), mask), expected)
    expected = bradley_terry_loss(scores[:, 1], scores[:, 0])
    assert_close(plackett_luce_loss(scores, double([7, 3]).expand(3, 2), mask), expected)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_probabilities_of_all_orders_sum_to_1_and_each_is_the_product_of_choices(size):
    scores = torch.randn(size, dtype=torch.float64) * 2
    orders = list(permutations(range(size)))  # from best to worst
    ranks = torch.tensor([[order.index(i) + 1 for i in range(size)] for order in orders])
    losses = plackett_luce_loss(scores.expand(len(orders), size), ranks, torch.ones(len(orders), size).bool())
    assert_close((-losses).exp().sum(), double(1)[0])
    for order, loss in zip(orders, losses.tolist(), strict=True):
        probability, left = 1.0, list(order)
        while left:
            probability *= math.exp(scores[left[0]]) / sum(math.exp(scores[j]) for j in left)
            left.pop(0)
        assert loss == pytest.approx(-math.log(probability), rel=1e-10)


def test_ties_against_a_slow_restatement():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(50, 6, generator=generator, dtype=torch.float64) * 2
    ranks = torch.randint(1, 5, (50, 6), generator=generator)
    expected = [slow_plackett_luce(s, r) for s, r in zip(scores.tolist(), ranks.tolist(), strict=True)]
    assert_close(plackett_luce_loss(scores, ranks, torch.ones(50, 6).bool()), double(*expected))


def test_the_order_within_a_list_does_not_matter_ties_included():
    scores, ranks = torch.randn(1, 5, dtype=torch.float64), torch.tensor([[2, 1, 2, 3, 2]])
    mask, shuffle = torch.ones(1, 5).bool(), torch.tensor([4, 0, 3, 1, 2])
    assert_close(
        plackett_luce_loss(scores[:, shuffle], ranks[:, shuffle], mask), plackett_luce_loss(scores, ranks, mask)
    )


def test_tied_items_pull_together_and_neither_is_above_the_other():
    scores = double([0.5, -0.5, -3.0]).requires_grad_()
    plackett_luce_loss(scores, double([1, 1, 2]), torch.ones(1, 3).bool()).backward()
    assert scores.grad[0, 0] > 0 > scores.grad[0, 1]
    equal = double([0.5, 0.5, -3.0]).requires_grad_()
    plackett_luce_loss(equal, double([1, 1, 2]), torch.ones(1, 3).bool()).backward()
    assert equal.grad[0, 0] < 0
    assert_close(equal.grad[0, 0], equal.grad[0, 1])


def test_only_the_order_of_ranks_and_differences_of_scores_count():
    scores, mask = whole([0.1, 0.9, -2.0, 0.0])
    expected = plackett_luce_loss(scores, double([2, 1, 1, 4]), mask)
    assert_close(plackett_luce_loss(scores + 7, double([30, -5, -5, 31]), mask), expected)
    assert not torch.isclose(plackett_luce_loss(scores, double([1, 2, 2, 4]), mask), expected)


@pytest.mark.parametrize("garbage", [0.0, 1e6, math.nan, math.inf])
def test_padding_changes_neither_value_nor_gradient(garbage):
    own = double([0.3, -1.0, 0.7]).requires_grad_()
    expected = plackett_luce_loss(own, double([2, 1, 2]), torch.ones(1, 3).bool())
    expected.sum().backward()
    padded = double([0.3, -1.0, 0.7, garbage, garbage]).requires_grad_()
    mask = torch.tensor([[True, True, True, False, False]])
    loss = plackett_luce_loss(padded, double([2, 1, 2, garbage, 1]), mask)
    loss.sum().backward()
    assert_close(loss, expected)
    assert_close(padded.grad[:, :3], own.grad)
    assert_close(padded.grad[:, 3:], torch.zeros(1, 2, dtype=torch.float64))


def test_plackett_luce_is_finite_for_any_score():
    scores = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    loss = plackett_luce_loss(scores, torch.tensor([[3, 2, 1]]), torch.ones(1, 3).bool())
    loss.sum().backward()
    assert loss.tolist() == [3e4]
    assert scores.grad.tolist() == [[2, -1, -1]]


# --- a scale of levels ------------------------------------------------------------------------------------------------


def test_shares_of_levels():
    ratings = torch.tensor([[0.0, 2.0, 2.0, 4.0], [2.0, 99.0, 99.0, 99.0]])
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    levels = torch.tensor([0.0, 2.0, 3.0, 4.0])
    shares = rating_shares(ratings, mask, levels)
    assert shares.tolist() == [[0.25, 0.5, 0, 0.25], [0, 1, 0, 0]]
    assert_close(shares @ levels, mean_rating(ratings, mask))
    assert rating_shares(ratings.long(), mask, levels).tolist() == shares.tolist()


def test_a_rating_that_is_no_level_is_refused_by_row():
    mask, levels = torch.ones(2, 2).bool(), torch.tensor([0.0, 1.0])
    message = r"`ratings` must be among the levels \[0.0, 1.0\], but text 1 of the batch .* has the rating 0.5"
    with pytest.raises(ValueError, match=message):
        rating_shares(torch.tensor([[0.0, 1.0], [1.0, 0.5]]), mask, levels)
    with pytest.raises(ValueError, match="has the rating nan"):
        rating_shares(torch.tensor([[0.0, 1.0], [1.0, math.nan]]), mask, levels)
    with pytest.raises(ValueError, match="row 1 has none"):
        rating_shares(torch.zeros(2, 2), torch.tensor([[True, True], [False, False]]), levels)


def test_thresholds_are_in_order_whatever_the_parameters():
    free = torch.tensor([3.0, -200.0, 50.0, -1e4, 0.0])
    thresholds = ordered_thresholds(free)
    assert (thresholds.diff() > 0).all()
    assert thresholds[0] == 3
    assert_close(ordered_thresholds(double(-1, 0)), double(-1, -1 + math.log(2) + 0.001))


def test_free_thresholds_are_the_inverse():
    thresholds = double(-2.5, -2.4, 0.0, 30.0, 130.0)
    assert_close(ordered_thresholds(free_thresholds(thresholds)), thresholds)
    assert free_thresholds(double(0.7)).tolist() == [0.7]
    for wrong in ([1.0, 1.0], [2.0, 1.0], [0.0, 0.0005]):
        with pytest.raises(ValueError, match=r"`thresholds` must increase by more than 0.001, but are \["):
            free_thresholds(double(*wrong))


def test_ordinal_probabilities_golden():
    # Thresholds ∓log 3: σ(−log 3) = 1/4, σ(log 3) = 3/4. A score of log 3 moves both down: σ(−2 log 3) = 1/10, 1/2.
    thresholds = double(-math.log(3), math.log(3))
    expected = double([1 / 4, 1 / 2, 1 / 4], [1 / 10, 4 / 10, 1 / 2])
    assert_close(ordinal_logprobs(double(0, math.log(3)), thresholds).exp(), expected)


def test_ordinal_probabilities_against_differences_of_sigmoids():
    scores, thresholds = torch.randn(20, dtype=torch.float64) * 3, double(-2.0, -0.5, 0.1, 4.0)
    found = ordinal_logprobs(scores, thresholds).exp()
    for s, row in zip(scores.tolist(), found.tolist(), strict=True):
        cumulative = [0.0, *[sigma(b - s) for b in thresholds.tolist()], 1.0]
        expected = [after - before for before, after in pairwise(cumulative)]
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert_close(found.sum(1), torch.ones(20, dtype=torch.float64))


def test_two_levels_are_a_logistic_regression():
    scores = torch.randn(6, dtype=torch.float64)
    assert_close(ordinal_logprobs(scores, double(0.0))[:, 1], torch.nn.functional.logsigmoid(scores))


def test_odds_are_proportional():
    """The log-odds of "at most level k" fall by the score, by as much at every k."""
    thresholds = double(-1.0, 0.2, 2.0)
    at_most = ordinal_logprobs(double(0.0, 0.7), thresholds).exp().cumsum(1)[:, :-1]
    assert_close(at_most[0].logit() - at_most[1].logit(), double(0.7, 0.7, 0.7))


def test_ordinal_logprobs_are_finite_far_out():
    scores = torch.tensor([200.0, -200.0], requires_grad=True)
    logprobs = ordinal_logprobs(scores, torch.tensor([-1.0, 0.0, 1.0]))
    logprobs.sum().backward()
    assert logprobs.isfinite().all()
    assert scores.grad.isfinite().all()
    assert logprobs[0, 0].item() == pytest.approx(-201)
    assert logprobs[0, 1].item() == pytest.approx(-200 + math.log(1 - math.exp(-1)), rel=1e-6)


def test_ordinal_loss_is_a_mean_over_the_raters_of_a_text():
    ratings = [[0, 2, 2], [1]]
    scores, thresholds = double(0.4, -1.0), double(-0.5, 1.5)
    shares = double([1 / 3, 0, 2 / 3], [0, 1, 0])
    expected = []
    for s, own in zip(scores.tolist(), ratings, strict=True):
        cumulative = [0.0, sigma(-0.5 - s), sigma(1.5 - s), 1.0]
        expected.append(-sum(math.log(cumulative[r + 1] - cumulative[r]) for r in own) / len(own))
    assert_close(ordinal_loss(scores, thresholds, shares), double(*expected))


def test_ordinal_loss_is_least_where_probabilities_are_the_shares():
    thresholds = double(-1.0, 0.5).requires_grad_()
    scores = double(0.3).requires_grad_()
    shares = ordinal_logprobs(scores, thresholds).exp().detach()
    ordinal_loss(scores, thresholds, shares).sum().backward()
    assert_close(scores.grad, double(0))
    assert_close(thresholds.grad, double(0, 0))


def test_wrong_shapes_are_refused():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3).bool()
    with pytest.raises(ValueError, match="`ranks` must have the shape of `scores`"):
        plackett_luce_loss(x, x[:, :2], mask)
    with pytest.raises(ValueError, match="`mask` must be a bool tensor"):
        plackett_luce_loss(x, x, x)
    with pytest.raises(ValueError, match="`shares` must have 3 columns"):
        ordinal_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="`scores` must have one entry per row of `shares`"):
        ordinal_loss(torch.zeros(3), torch.zeros(2), x)
    with pytest.raises(ValueError, match="`mask` must have the shape of `ratings`"):
        rating_shares(x, mask[:1], torch.zeros(1))


def test_half_precision_gives_float32():
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert plackett_luce_loss(x, x, torch.ones(2, 3).bool()).dtype == torch.float32
    assert ordinal_loss(x[:, 0], x[0].float().cumsum(0) + torch.arange(3), torch.ones(2, 4)).dtype == torch.float32
