"""Three means over tokens: by hand, and in parts that add up."""

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.functional import fixed_length_mean, sequence_mean, token_mean

LOSSES = torch.tensor([[1.0, 2.0, 3.0], [5.0, torch.nan, torch.nan], [4.0, 0.0, torch.nan]])
MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
# Sums 6, 5, 4; lengths 3, 1, 2; means 2, 5, 2.
GOLDEN = {"token": 15 / 6, "sequence": 9 / 3, "fixed": 15 / (3 * 10)}
WAYS = {"token": token_mean, "sequence": sequence_mean, "fixed": lambda x, m: fixed_length_mean(x, m, length=10)}


@pytest.mark.parametrize("way", WAYS)
def test_golden(way):
    total, count = WAYS[way](LOSSES, MASK)
    assert (total / count).item() == pytest.approx(GOLDEN[way])


@pytest.mark.parametrize("way", WAYS)
def test_parts_of_micro_batches_add_up(way):
    whole = WAYS[way](LOSSES, MASK)
    parts = [WAYS[way](LOSSES[i : i + 1], MASK[i : i + 1]) for i in range(3)]
    assert_close(sum(p.total for p in parts), whole.total)
    assert sum(int(p.count) for p in parts) == int(whole.count)


@pytest.mark.parametrize("way", WAYS)
def test_padding_changes_nothing_and_gets_no_gradient(way):
    wider, mask = torch.nn.functional.pad(LOSSES, (0, 2), value=torch.inf), torch.nn.functional.pad(MASK, (0, 2))
    assert_close(WAYS[way](wider, mask), WAYS[way](LOSSES, MASK))
    leaf = wider.clone().requires_grad_()
    WAYS[way](leaf, mask).total.backward()
    assert torch.equal(leaf.grad != 0, mask)


def test_equal_lengths_make_them_agree_up_to_the_constant():
    losses = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 5, dtype=torch.bool)
    token, sequence, fixed = (total / count for total, count in (way(losses, mask) for way in WAYS.values()))
    assert_close(token, sequence)
    assert_close(fixed, token / 2)
