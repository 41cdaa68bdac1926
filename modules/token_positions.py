"""From positions in a response's text to its tokens."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache

from transformers import PreTrainedTokenizerBase


def tokens_of_ends(ends: Sequence[int], text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Numbers of the tokens in which text[:end] becomes complete, for each `end`.

    A character of several tokens (an emoji of several bytes) is complete with its last one; a character within a token
    of several belongs to that token. Found by decoding beginnings of `ids`, log₂ T of them for each end: what a single
    token decodes to depends on its neighbours.

    Args:
        ends: 1 to len(text); in an empty text 0, which is the first token, its EOS.
        text: the response, without the EOS.
        ids: its tokens, with or without EOS.
        tokenizer: by which `text` was decoded.

    Raises:
        ValueError: for a position outside the text, or a text that these tokens do not spell.
    """
    # Some tokenizers drop the space at the start of what they decode; the text, decoded behind its prompt, has it.
    dropped = int(text.startswith(" ") and not tokenizer.decode(ids).startswith(" "))

    @cache
    def complete(count: int) -> int:
        """How many characters of the text the first `count` tokens spell; half a character decodes to another one."""
        return dropped + _in_common(tokenizer.decode(ids[:count]), text[dropped:])

    return [_token_of(end, text, ids, complete) for end in ends]


def _token_of(end: int, text: str, ids: list[int], complete: Callable[[int], int]) -> int:
    if not (1 <= end <= len(text) or (end == 0 and not text)):
        raise ValueError(f"a step must end at 1 to {len(text)}, the response's length in characters, but got {end}")
    token = bisect_left(range(1, len(ids) + 1), end, key=complete)
    if token == len(ids):
        raise ValueError(f"the {len(ids)} tokens of the response do not spell its first {end} characters")
    return token


def _in_common(one: str, other: str) -> int:
    """Length of the longest beginning of both."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
