"""Diversity: counted by hand, counted slowly, and at its limits."""

import random
from collections import Counter

import pytest
import torch

from lightning_rlhf.functional import distinct_n, unique_share

SEQUENCES = [["a", "b", "a", "b"], ["b", "a"], ["c"]]


def test_distinct_n_golden():
    # Unigrams: a, b, a, b, b, a, c: 3 of 7. Bigrams: ab, ba, ab, ba: 2 of 4. Trigrams: aba, bab: 2 of 2.
    assert distinct_n(SEQUENCES, n=1) == 3 / 7
    assert distinct_n(SEQUENCES, n=2) == 2 / 4
    assert distinct_n(SEQUENCES, n=3) == 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_equals_counting_joined_windows(n):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abc", k=rng.randrange(8))) for _ in range(20)]
    counts = Counter(
        window for text in texts for window in map("".join, zip(*(text[i:] for i in range(n)), strict=False))
    )
    assert distinct_n(texts, n) == len(counts) / counts.total()


def test_distinct_n_limits():
    assert distinct_n([[1, 2, 3], [4, 5, 6]], n=2) == 1  # nothing repeats
    assert distinct_n([[7] * 10], n=1) == 0.1  # one word ten times
    assert distinct_n([[1], []], n=2) == distinct_n([], n=1) == 0  # nothing to count


def test_ngrams_do_not_cross_from_one_sequence_to_the_next():
    assert distinct_n([[1, 2], [1, 2], [2, 1]], n=2) == 2 / 3


def test_sequences_too_short_to_count_change_nothing():
    assert distinct_n([*SEQUENCES, [], ["z"]], n=2) == distinct_n(SEQUENCES, n=2)


def test_distinct_n_refuses_n_below_1():
    with pytest.raises(ValueError, match="`n` must be at least 1, but is 0"):
        distinct_n(SEQUENCES, n=0)


def test_unique_share_golden_and_limits():
    assert unique_share([[1, 2], [1, 2], [2, 1], [1]]) == 3 / 4
    assert unique_share(["same"] * 5) == 1 / 5
    assert unique_share(SEQUENCES) == 1
    assert unique_share([]) == 0


def test_unique_share_equals_torch_unique():
    tokens = torch.randint(0, 2, (12, 3), generator=torch.Generator().manual_seed(0))
    assert unique_share(tokens.tolist()) == len(tokens.unique(dim=0)) / 12
