"""Rewards per token: where the score lands, what the KL costs."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.functional import kl_shaped_rewards, penalize_missing_eos, soft_overlong_penalty

SCORES = torch.tensor([2.0, -1.0], dtype=torch.float64)
KL = torch.tensor([[1.0, 3.0, 9.0], [-2.0, 0.0, 4.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, True, True]])


def test_penalize_missing_eos_golden():
    # The second response did not end: -1 - 0.5 = -1.5.
    actual = penalize_missing_eos(SCORES, torch.tensor([True, False]), penalty=0.5)
    assert_close(actual, torch.tensor([2.0, -1.5], dtype=torch.float64))


def test_penalize_missing_eos_equals_a_loop_and_its_limits():
    scores = torch.randn(9, generator=torch.Generator().manual_seed(0))
    ended = torch.arange(9) % 3 == 0
    expected = [score if end else score - 2.0 for score, end in zip(scores, ended, strict=True)]
    assert_close(penalize_missing_eos(scores, ended, penalty=2.0), torch.stack(expected))
    assert_close(penalize_missing_eos(scores, ended, penalty=0.0), scores)
    assert_close(penalize_missing_eos(scores, torch.ones(9, dtype=torch.bool), penalty=2.0), scores)


def test_kl_shaped_rewards_golden():
    # kl_coef 0.5. Row 0 ends at token 1: -0.5, -1.5 + 2 = 0.5, nothing. Row 1: 1, 0, -2 - 1 = -3.
    expected = torch.tensor([[-0.5, 0.5, 0.0], [1.0, 0.0, -3.0]], dtype=torch.float64)
    assert_close(kl_shaped_rewards(SCORES, KL, MASK, kl_coef=0.5), expected)


def test_kl_shaped_rewards_equal_a_loop():
    generator = torch.Generator().manual_seed(0)
    scores, kl = torch.randn(5, generator=generator), torch.randn(5, 6, generator=generator)
    lengths = [1, 6, 3, 2, 5]
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    expected = torch.zeros(5, 6)
    for i, length in enumerate(lengths):
        for t in range(length):
            expected[i, t] = -0.1 * kl[i, t] + (scores[i] if t == length - 1 else 0.0)
    assert_close(kl_shaped_rewards(scores, kl, mask, kl_coef=0.1), expected)


def test_rewards_sum_to_the_score_less_the_kl_of_the_sequence():
    rewards = kl_shaped_rewards(SCORES, KL, MASK, kl_coef=0.3)
    # KL of the rows: 1 + 3 = 4 and -2 + 0 + 4 = 2.
    assert_close(rewards.sum(1), SCORES - 0.3 * torch.tensor([4.0, 2.0], dtype=torch.float64))


def test_without_kl_only_the_last_token_is_rewarded():
    expected = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, -1.0]], dtype=torch.float64)
    assert_close(kl_shaped_rewards(SCORES, KL, MASK, kl_coef=0.0), expected)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e300])
def test_garbage_under_the_mask_changes_neither_value_nor_gradient(garbage):
    kl = KL.masked_fill(~MASK, garbage).requires_grad_()
    rewards = kl_shaped_rewards(SCORES, kl, MASK, kl_coef=0.5)
    rewards.sum().backward()
    assert_close(rewards.detach(), kl_shaped_rewards(SCORES, KL.masked_fill(~MASK, 0.0), MASK, kl_coef=0.5))
    assert_close(kl.grad, torch.where(MASK, -0.5, 0.0).double())


def test_appended_columns_change_nothing():
    kl = torch.cat([KL, torch.full((2, 2), math.nan)], dim=1)
    mask = torch.cat([MASK, torch.zeros(2, 2, dtype=torch.bool)], dim=1)
    longer = kl_shaped_rewards(SCORES, kl, mask, kl_coef=0.5)
    assert_close(longer[:, :3], kl_shaped_rewards(SCORES, KL, MASK, kl_coef=0.5))
    assert not longer[:, 3:].any()


def test_half_precision_gives_float32():
    assert kl_shaped_rewards(SCORES.bfloat16(), KL.bfloat16(), MASK, kl_coef=0.1).dtype == torch.float32
    assert penalize_missing_eos(SCORES.bfloat16(), MASK[:, 2], penalty=1.0).dtype == torch.float32


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`ended` must have the shape of `scores`, \(2,\), but has \(3,\)"):
        penalize_missing_eos(SCORES, MASK[0], penalty=1.0)
    with pytest.raises(ValueError, match="`ended` must be a bool tensor"):
        penalize_missing_eos(SCORES, torch.tensor([0, 1]), penalty=1.0)
    with pytest.raises(ValueError, match=r"`mask` must have the shape of `kl`"):
        kl_shaped_rewards(SCORES, KL, MASK[:, :2], kl_coef=0.1)
    with pytest.raises(ValueError, match=r"`scores` must have one entry per row of `kl`, shape \(2,\), but has \(1,\)"):
        kl_shaped_rewards(SCORES[:1], KL, MASK, kl_coef=0.1)
    with pytest.raises(ValueError, match="row 1 is all False"):
        kl_shaped_rewards(SCORES, KL, torch.tensor([[True] * 3, [False] * 3]), kl_coef=0.1)


def test_soft_overlong_penalty_golden_and_its_ends():
    # Limit 20, buffer 4: free up to 16, then a quarter a token.
    lengths = torch.tensor([1, 16, 17, 18, 20])
    assert_close(soft_overlong_penalty(lengths, max_length=20, buffer=4), torch.tensor([0, 0, 0.25, 0.5, 1.0]))
    assert soft_overlong_penalty(torch.tensor([25]), max_length=20, buffer=4).item() == 1
    assert_close(soft_overlong_penalty(torch.tensor([5]), max_length=20, buffer=20), torch.tensor([0.25]))


@pytest.mark.parametrize("buffer", [0, 21])
def test_the_overlong_buffer_lies_within_the_limit(buffer):
    with pytest.raises(ValueError, match=f"`buffer` must be between 1 and max_length=20, but is {buffer}"):
        soft_overlong_penalty(torch.tensor([5]), max_length=20, buffer=buffer)
