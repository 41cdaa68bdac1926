import pytest
import torch

from lightning_rlhf.datamodules.text import (
    as_messages,
    as_number,
    check_text,
    encode_completion,
    encode_prompt,
    encode_text,
    pad,
    pad_id,
    padding_mask,
    render,
    render_prompt,
    split_messages,
    split_pair,
    surely_fits,
)

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
A_, B_, C_ = 97, 98, 99


def test_encode_text_masks_only_the_first_token(char_tokenizer):
    assert encode_text(char_tokenizer, "abc", 8, True) == ([A_, B_, C_, 0], [False, True, True, True])
    assert encode_text(char_tokenizer, "abc", 8, False) == ([A_, B_, C_], [False, True, True])


def test_truncation_takes_the_eos_first(char_tokenizer):
    assert encode_text(char_tokenizer, "abc", 3, True).ids == [A_, B_, C_]
    assert encode_completion(char_tokenizer, "a", "bc", 2, True) == ([A_, B_], [False, True])


def test_encode_completion_masks_the_prompt(char_tokenizer):
    assert encode_completion(char_tokenizer, "ab", "c", 8, True) == ([A_, B_, C_, 0], [False, False, True, True])
    assert encode_completion(char_tokenizer, "ab", "c", 8, False) == ([A_, B_, C_], [False, False, True])


def test_empty_prompt_leaves_the_first_token_without_a_prediction(char_tokenizer):
    assert encode_completion(char_tokenizer, "", "ab", 8, True) == ([A_, B_, 0], [False, True, True])


def test_eos_is_not_doubled(char_tokenizer):
    assert encode_completion(char_tokenizer, "a", "b<eos>", 8, True).ids == [A_, B_, 0]


def test_default_special_tokens(bos_tokenizer):
    """BOS stays, an EOS that the tokenizer adds by itself is ours to decide."""
    assert encode_prompt(bos_tokenizer, "ab") == [2, A_, B_]
    assert encode_text(bos_tokenizer, "ab", 8, True) == ([2, A_, B_, 0], [False, True, True, True])
    assert encode_text(bos_tokenizer, "ab", 8, False).ids == [2, A_, B_]
    assert encode_completion(bos_tokenizer, "a", "b", 8, True) == ([2, A_, B_, 0], [False, False, True, True])
    assert encode_completion(bos_tokenizer, "", "b", 8, True).loss_mask == [False, True, True]


def test_prompt_and_completion_are_tokenised_apart(char_tokenizer):
    """A tokenizer that merges "ab" into one token must not do so across the seam."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    merging = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<eos>": 3}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="<eos>")
    assert encode_text(tokenizer, "ab", 8, False).ids == [2]
    assert encode_completion(tokenizer, "a", "b", 8, True) == ([0, 1, 3], [False, True, True])


def test_render_messages(char_tokenizer):
    assert render_prompt(char_tokenizer, [U]) == ("u>hi<eos>\na>", "", True)
    # The line break after the last EOS is left out: generation ends at EOS.
    assert render(char_tokenizer, [U], [A]) == ("u>hi<eos>\na>", "yo<eos>", True)
    assert render(char_tokenizer, "p", "c") == ("p", "c", False)


def test_encode_messages_has_one_eos_and_the_seam_of_generation(char_tokenizer):
    ids, loss_mask = encode_completion(char_tokenizer, [U], [A], 99, True)
    prompt = encode_prompt(char_tokenizer, "u>hi<eos>\na>", templated=True)
    assert ids == [*prompt, ord("y"), ord("o"), 0]
    assert loss_mask == [False] * len(prompt) + [True] * 3


def test_template_that_opens_the_answer_otherwise(char_tokenizer):
    """As some reasoning models do: the prompt opens a thought that a finished chat does not have."""
    char_tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m['content'] }}{% endfor %}{% if add_generation_prompt %}<?{% endif %}"
    )
    assert render(char_tokenizer, [U], [A]) == ("<hi<", "yo", True)


def test_template_errors(char_tokenizer):
    char_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"chat template refuses the messages .* roles must alternate"):
        render_prompt(char_tokenizer, [U])
    char_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template; use an instruction-tuned"):
        render_prompt(char_tokenizer, [U])


def test_render_refuses_a_mixture(char_tokenizer):
    with pytest.raises(ValueError, match="both be text or both"):
        render(char_tokenizer, "p", [A])


def test_no_eos(char_tokenizer):
    char_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        encode_text(char_tokenizer, "a", 8, True)


def test_split_messages_takes_the_last_assistant_turn():
    system, later = {"role": "system", "content": "s"}, {"role": "user", "content": "more"}
    assert split_messages([system, U, A, U, A, later]) == ([system, U, A, U], [A])
    for bad in ([U], [A], [A, U]):
        with pytest.raises(ValueError, match="assistant turn with another turn before it"):
            split_messages(bad)


def test_as_messages():
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    assert as_messages(sharegpt) == [U, A]
    assert as_messages([U | {"name": None}]) == [U]
    with pytest.raises(ValueError, match="turns: a message needs role and content"):
        as_messages([{"role": "user", "content": None}], "turns")
    with pytest.raises(ValueError, match="must be an object with role and content, not 'hi'"):
        as_messages(["hi"])


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        ("P", "good", "bad", ("P", "good", "bad")),
        (None, "A: good", "A: goat", ("A:", " good", " goat")),
        (None, "A: yes", "A: yes sir", ("A:", " yes", " yes sir")),
        (None, "A:\n\nx y", "A:\n\nx z", ("A:\n\nx", " y", " z")),
        (None, "good", "goat", ("", "good", "goat")),
        (None, [U, A], [U, U], ([U], [A], [U])),
        ([U], [A], [U], ([U], [A], [U])),
        ("hi", [U, A], [U, U], ([U], [A], [U])),
    ],
)
def test_split_pair(prompt, chosen, rejected, expected):
    assert split_pair(prompt, chosen, rejected) == expected


def test_check_text():
    assert check_text("", "c", allow_empty=True) == ""
    with pytest.raises(ValueError, match="c is empty"):
        check_text(" \n", "c")
    with pytest.raises(ValueError, match="c is empty"):
        check_text([], "c")
    with pytest.raises(ValueError, match="c must be text or a list of messages, not 3"):
        check_text(3, "c")


@pytest.mark.parametrize("bad", [None, "x", True, float("nan"), float("inf"), []])
def test_as_number_refuses(bad):
    with pytest.raises(ValueError, match="m must be a finite number"):
        as_number(bad, "m")


def test_pad_and_its_mask():
    sequences = [[7], [0, 8]]  # 0 as a value of its own: masks must not look at values
    assert pad(sequences, "right", 0).tolist() == [[7, 0], [0, 8]]
    assert pad(sequences, "left", 0).tolist() == [[0, 7], [0, 8]]
    assert padding_mask(sequences, "right").tolist() == [[True, False], [True, True]]
    assert padding_mask(sequences, "left").tolist() == [[False, True], [True, True]]
    assert [pad([[1]], "left", value).dtype for value in (False, 0, 0.0)] == [torch.bool, torch.int64, torch.float32]


def test_pad_id(char_tokenizer):
    char_tokenizer.pad_token = "a"
    assert pad_id(char_tokenizer) == A_
    char_tokenizer.pad_token = None
    assert pad_id(char_tokenizer) == 0


def test_surely_fits_counts_bytes():
    assert surely_fits("ab", 10)
    assert not surely_fits("ab", 9)
    assert not surely_fits("é", 9)
