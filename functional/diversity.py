"""How varied a set of texts is, the first thing to fall when a policy collapses. Plain Python, no tensors."""

from collections.abc import Hashable, Sequence


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Share of different n-grams among all n-grams of all sequences together.

    Compare only sets of equal size: the share falls as a set grows.

    Args:
        sequences: token ids or words, each of any length; tensors need `.tolist()` first.
        n: length of the n-grams, usually 1 to 4.

    Returns:
        0 (also if no sequence has n tokens) to 1.

    Raises:
        ValueError: if `n` is not positive.

    Source:
        Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models",
        https://arxiv.org/abs/1510.03055

    Example:
        >>> distinct_n(["a b a b".split()], n=2)
        0.6666666666666666
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, but is {n}.")
    ngrams = [tuple(sequence[i : i + n]) for sequence in sequences for i in range(len(sequence) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def unique_share(sequences: Sequence[Sequence[Hashable]]) -> float:
    """Share of different sequences among all.

    Args:
        sequences: token ids, words or strings; tensors need `.tolist()` first.

    Returns:
        0 (if there are none) to 1.

    Example:
        >>> unique_share(["good", "bad", "good", "good"])
        0.5
    """
    return len({tuple(sequence) for sequence in sequences}) / len(sequences) if len(sequences) else 0.0
