import pytest
from datasets import Dataset

from lightning_rlhf.datamodules import SFTDataModule

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def make(tokenizer, data, **kwargs) -> SFTDataModule:
    data = Dataset.from_list(data) if isinstance(data, list) else data
    module = SFTDataModule(data, tokenizer=tokenizer, **kwargs)
    module.prepare_data()
    module.setup("fit")
    return module


def batch(tokenizer, data, **kwargs) -> dict:
    """All rows as one batch, in their order."""
    module = make(tokenizer, data, **kwargs)
    return {key: value.tolist() for key, value in module.collate_function()(list(module.ready("train"))).items()}


def test_plain_text(char_tokenizer):
    assert batch(char_tokenizer, [{"text": "ab"}, {"text": "c"}]) == {
        "input_ids": [[97, 98, 0], [99, 0, 0]],
        # The EOS of the second row is real, the 0 after it padding: pad == eos.
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "loss_mask": [[False, True, True], [False, True, False]],
    }


def test_dtypes_and_loader(char_tokenizer):
    found = next(iter(make(char_tokenizer, [{"text": "ab"}]).train_dataloader()))
    assert {key: str(value.dtype) for key, value in found.items()} == {
        "input_ids": "torch.int64",
        "attention_mask": "torch.int64",
        "loss_mask": "torch.bool",
    }


def test_prompt_and_completion(char_tokenizer):
    assert batch(char_tokenizer, [{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "b"}]) == {
        "input_ids": [[97, 98, 99, 0], [97, 98, 0, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "loss_mask": [[False, False, True, True], [False, True, True, False]],
    }


def test_messages_and_conversational_prompt_completion_agree(char_tokenizer):
    expected = [ord(c) for c in "u>hi"] + [0, 10] + [ord(c) for c in "a>yo"] + [0]
    for row in ({"messages": [U, A, U]}, {"prompt": [U], "completion": [A]}, {"conversations": [U, A]}):
        found = batch(char_tokenizer, [row])
        assert found["input_ids"] == [expected]
        assert found["loss_mask"] == [[False] * 8 + [True] * 3]


def test_earlier_answers_are_not_learned(char_tokenizer):
    found = batch(char_tokenizer, [{"messages": [U, A, U, A]}])
    assert sum(found["loss_mask"][0]) == 3


def test_append_eos(char_tokenizer):
    assert batch(char_tokenizer, [{"text": "ab"}], append_eos=False)["input_ids"] == [[97, 98]]
    row = [{"prompt": "a", "completion": "b"}]
    assert batch(char_tokenizer, row, append_eos=False)["input_ids"] == [[97, 98]]


def test_csv_with_input_and_output(char_tokenizer, tmp_path):
    (tmp_path / "d.csv").write_text("input,output\na,1\n")
    found = batch(char_tokenizer, str(tmp_path / "d.csv"))
    assert found["input_ids"] == [[97, 49, 0]]
    assert found["loss_mask"] == [[False, True, True]]


def test_columns(char_tokenizer):
    row = {"text": "t", "prompt": "p", "completion": "c", "messages": [U, A], "body": "b"}

    def first(**flags):
        return "".join(map(chr, batch(char_tokenizer, [row], append_eos=False, **flags)["input_ids"][0]))

    assert first(text_column="body") == "b"
    assert first(text_column="text") == "t"
    assert first(prompt_column="body") == "bc"
    assert first(completion_column="body") == "pb"
    assert first(messages_column="messages").startswith("u>hi")
    assert first().startswith("u>hi")  # messages, then prompt and completion, then text
    del row["messages"]
    assert first() == "pc"
    del row["completion"]
    assert first() == "t"


def test_max_length_cuts_and_reports(char_tokenizer):
    rows = [{"prompt": "ab", "completion": "cdefgh"}, {"prompt": "a", "completion": "b"}]
    with pytest.warns(
        UserWarning, match="1 of 2 rows have more than `max_length`=4 tokens and are cut from the right$"
    ):
        found = batch(char_tokenizer, rows, max_length=4)
    assert found["input_ids"] == [[97, 98, 99, 100], [97, 98, 0, 0]]
    assert found["loss_mask"] == [[False, False, True, True], [False, True, True, False]]


def test_rows_with_nothing_left_to_learn_are_left_out(char_tokenizer):
    rows = [{"prompt": "abcd", "completion": "e"}, {"prompt": "a", "completion": "b"}]
    with pytest.warns(UserWarning, match="; 1 of them would keep nothing to learn from and are left out"):
        assert batch(char_tokenizer, rows, max_length=4)["input_ids"] == [[97, 98, 0]]
    with pytest.raises(ValueError, match="no train row is left within the length limits"):
        make(char_tokenizer, rows[:1], max_length=4)


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"x": "y"}, {}, r"`data`: no columns to learn from; its columns are \['x'\]"),
        ({"text": "t"}, {"text_column": "x"}, r"no column 'x' \(`text_column`\)"),
        ({"prompt": "p"}, {"prompt_column": "prompt"}, "no completion column"),
        ({"text": "t", "prompt": "p"}, {"text_column": "text", "prompt_column": "prompt"}, "flags for one form of row"),
        ({"text": ""}, {}, "row 0 .*text is empty"),
        ({"prompt": "p", "completion": ""}, {}, "row 0 .*completion is empty"),
        ({"prompt": None, "completion": "c"}, {}, "row 0 .*prompt must be text or a list of messages, not None"),
        ({"prompt": "p", "completion": [A]}, {}, "row 0 .*both be text or both be lists"),
        ({"messages": [U]}, {}, "row 0 .*needs an assistant turn"),
        ({"messages": []}, {}, "row 0 .*messages is empty"),
        ({"messages": "hi"}, {}, "row 0 .*messages must be a list of messages"),
    ],
)
def test_errors(char_tokenizer, row, flags, message):
    with pytest.raises(ValueError, match=message):
        make(char_tokenizer, [row], **flags)


def test_empty_prompt_is_allowed(char_tokenizer):
    assert batch(char_tokenizer, [{"prompt": "", "completion": "ab"}])["loss_mask"] == [[False, True, True]]
