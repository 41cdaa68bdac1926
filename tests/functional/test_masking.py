"""Masks, and sums and means over them: golden values, slow versions, garbage."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.functional import (
    last_index,
    masked_mean,
    masked_mean_and_var,
    masked_sum,
    position_ids,
    response_mask,
    scale_to_unit_variance,
    whiten,
)

X = torch.tensor([[1.0, 2.0, 6.0], [3.0, 9.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, False, False]])
GARBAGE = [math.nan, math.inf, -math.inf, 1e300]


@pytest.fixture
def tokens():
    return torch.randint(0, 5, (6, 9), generator=torch.Generator().manual_seed(0))


def random_case():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 7, generator=generator, dtype=torch.float64) * 3 + 5
    mask = torch.rand(4, 7, generator=generator) < 0.6
    return x, mask


def test_response_mask_includes_the_first_eos_and_ends_there():
    # EOS is 2: row 0 has it at 1 (and as padding), row 1 never, row 2 at once.
    tokens = torch.tensor([[5, 2, 2], [5, 6, 7], [2, 5, 2]])
    expected = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    assert_close(response_mask(tokens, [2]), expected)


def test_response_mask_equals_a_loop(tokens):
    expected = [[not any(token in (2, 4) for token in row[:t]) for t in range(len(row))] for row in tokens.tolist()]
    assert_close(response_mask(tokens, eos_token_ids=(2, 4)), torch.tensor(expected))


def test_response_mask_without_eos_ids_is_all_true(tokens):
    assert response_mask(tokens, []).all()


def test_response_mask_ignores_what_follows_the_eos(tokens):
    mask = response_mask(tokens, [2])
    assert_close(response_mask(tokens.masked_fill(~mask, 2), [2]), mask)
    assert_close(response_mask(tokens.masked_fill(~mask, 3), [2]), mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_position_ids_start_at_the_first_real_token(dtype):
    attention_mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], dtype=dtype)
    assert_close(position_ids(attention_mask), torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]]))


def test_position_ids_of_a_bare_and_a_padded_sequence_agree():
    padded = torch.tensor([[0] * 3 + [1] * 5])
    assert_close(position_ids(padded)[:, 3:], torch.arange(5).unsqueeze(0))


def test_last_index_is_that_of_the_last_true():
    mask = torch.tensor([[True, False, False], [True, True, False], [False, False, True], [True, False, True]])
    assert_close(last_index(mask), torch.tensor([0, 1, 2, 2]))


def test_last_index_equals_a_loop():
    _, mask = random_case()
    expected = [max(t for t, counts in enumerate(row) if counts) for row in mask.tolist()]
    assert_close(last_index(mask), torch.tensor(expected))


def test_last_index_names_the_empty_row():
    with pytest.raises(ValueError, match=r"`mask`.*row 1 is all False"):
        last_index(torch.tensor([[True], [False]]))


def test_masked_sum_and_mean_golden():
    # Counted: 1 + 2 + 6 in row 0, 3 in row 1. Sum 12, mean 12 / 4 = 3. By row 9 / 3 = 3 and 3 / 1 = 3.
    assert masked_sum(X, MASK).item() == 12
    assert masked_sum(X, MASK, dim=1).tolist() == [9, 3]
    assert masked_mean(X, MASK).item() == 3
    # By column: (1 + 3) / 2, 2 / 1, 6 / 1.
    assert masked_mean(X, MASK, dim=0).tolist() == [2, 2, 6]


def test_masked_mean_equals_indexing():
    x, mask = random_case()
    assert_close(masked_sum(x, mask), x[mask].sum())
    assert_close(masked_mean(x, mask), x[mask].mean())
    assert_close(
        masked_mean(x, mask, dim=1), torch.stack([row[counts].mean() for row, counts in zip(x, mask, strict=True)])
    )


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_mean_and_var, whiten, scale_to_unit_variance])
def test_garbage_under_the_mask_changes_neither_value_nor_gradient(function, garbage):
    x, mask = random_case()
    weights = torch.arange(28, dtype=torch.float64).reshape(4, 7)  # or the gradient of a whitened sum would be 0

    def value_and_gradient(x):
        x = x.clone().requires_grad_()
        result = function(x, mask)
        value = sum(result) if isinstance(result, tuple) else (result * weights).sum()
        value.backward()
        return value.detach(), x.grad

    value, gradient = value_and_gradient(x.masked_fill(~mask, garbage))
    expected_value, expected_gradient = value_and_gradient(x.masked_fill(~mask, 0.0))
    assert_close(value, expected_value)
    assert_close(gradient, expected_gradient)
    assert gradient[mask].abs().sum() > 0
    assert not gradient[~mask].any()


@pytest.mark.parametrize("function", [masked_sum, masked_mean, whiten, scale_to_unit_variance])
def test_half_precision_becomes_float32_also_where_bfloat16_is_the_default(function):
    x = torch.tensor([[1.0, 2.0, 6.0], [3.0, 9.0, 9.0]])
    expected = function(x, MASK)
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = function(x.bfloat16(), MASK)
    finally:
        torch.set_default_dtype(torch.float32)
    assert actual.dtype == torch.float32
    assert_close(actual, expected)


def test_arguments_are_not_written_into():
    x, mask = X.clone(), MASK.clone()
    whiten(x, mask)
    scale_to_unit_variance(x, mask)
    assert torch.equal(x, X)
    assert torch.equal(mask, MASK)


def test_wrong_masks_are_refused():
    with pytest.raises(ValueError, match=r"`mask` must have the shape of `x`, \(2, 3\), but has \(3,\)"):
        masked_mean(X, MASK[0])
    with pytest.raises(ValueError, match=r"`mask` must be a bool tensor.*torch.int64"):
        masked_mean(X, MASK.long())
