import pytest
import torch
from datasets import Dataset

from lightning_rlhf.datamodules import PreferenceDataModule

U, YES, NO = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "y"},
    {"role": "assistant", "content": "n"},
)


def make(tokenizer, rows, **kwargs) -> PreferenceDataModule:
    module = PreferenceDataModule(Dataset.from_list(rows), tokenizer=tokenizer, **kwargs)
    module.prepare_data()
    module.setup("fit")
    return module


def batch(tokenizer, rows, **kwargs) -> dict:
    module = make(tokenizer, rows, **kwargs)
    return module.collate_function()(list(module.ready("train")))


def test_chosen_first_then_rejected(char_tokenizer):
    rows = [
        {"prompt": "p", "chosen": "ab", "rejected": "c", "margin": 2},
        {"prompt": "pq", "chosen": "d", "rejected": "e", "margin": 1},
    ]
    found = batch(char_tokenizer, rows)
    assert {key: value.tolist() for key, value in found.items()} == {
        "input_ids": [[112, 97, 98, 0], [112, 113, 100, 0], [112, 99, 0, 0], [112, 113, 101, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]],
        "loss_mask": [
            [False, True, True, True],
            [False, False, True, True],
            [False, True, True, False],
            [False, False, True, True],
        ],
        "margin": [2.0, 1.0],
        "preference": [1.0, 1.0],
    }
    assert [value.dtype for value in found.values()] == [torch.int64, torch.int64, torch.bool, *[torch.float32] * 2]


def test_conversational_and_implicit_prompts_agree(char_tokenizer):
    expected = batch(char_tokenizer, [{"prompt": [U], "chosen": [YES], "rejected": [NO]}])
    assert expected["input_ids"][0].tolist() == [117, 62, 113, 0, 10, 97, 62, 121, 0]
    assert expected["loss_mask"][1].tolist() == [False] * 7 + [True, True]
    for row in (
        {"chosen": [U, YES], "rejected": [U, NO]},
        {"prompt": "q", "chosen": [U, YES], "rejected": [U, NO]},
    ):
        found = batch(char_tokenizer, [row])
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_implicit_prompt_of_text(char_tokenizer):
    found = batch(char_tokenizer, [{"chosen": "Q A", "rejected": "Q B"}])
    assert found["input_ids"].tolist() == [[81, 32, 65, 0], [81, 32, 66, 0]]
    assert found["loss_mask"].tolist() == [[False, True, True, True]] * 2
    assert found["margin"].tolist() == [0.0]


def test_columns(char_tokenizer):
    row = {"q": "Q", "good": "g", "bad": "b", "by": 3, "share": 0.75}
    flags = {"prompt_column": "q", "chosen_column": "good", "rejected_column": "bad", "margin_column": "by"}
    found = batch(char_tokenizer, [row], preference_column="share", **flags)
    assert found["input_ids"].tolist() == [[81, 103, 0], [81, 98, 0]]
    assert found["margin"].tolist() == [3.0]
    assert found["preference"].tolist() == [0.75]


def test_shares_of_people_are_read_row_by_row(char_tokenizer, write_jsonl):
    rows = [{"prompt": "p", "chosen": "ab", "rejected": "c", "preference": share} for share in (0, 0.25, 1, "0.5")]
    module = PreferenceDataModule(write_jsonl(*rows[:3]), tokenizer=char_tokenizer)
    module.setup("fit")
    assert module.collate_function()(list(module.ready("train")))["preference"].tolist() == [0, 0.25, 1]
    assert batch(char_tokenizer, rows[3:])["preference"].tolist() == [0.5]  # the text of a CSV file


def test_max_length(char_tokenizer):
    rows = [
        {"prompt": "p", "chosen": "abc", "rejected": "d"},
        {"prompt": "p", "chosen": "aax", "rejected": "aay"},  # equal within the limit
        {"prompt": "pppp", "chosen": "a", "rejected": "b"},  # nothing of the answers is left
    ]
    message = "3 of 3 rows have more than `max_length`=3 tokens and are cut from the right; 2 of them"
    with pytest.warns(UserWarning, match=message):
        found = batch(char_tokenizer, rows, max_length=3)
    assert found["input_ids"].tolist() == [[112, 97, 98], [112, 100, 0]]


def test_val_share_keeps_pairs_of_one_prompt_together(char_tokenizer):
    rows = [{"chosen": f"q{i % 10} a{i}", "rejected": f"q{i % 10} b"} for i in range(40)]
    module = make(char_tokenizer, rows, val_share=0.5)
    sides = [{row["rejected"] for row in module.ready(split)} for split in ("train", "validation")]
    assert all(sides)
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a"}, "`data`: no rejected column"),
        ({"rejected": "a"}, "`data`: no chosen column"),
        ({"chosen": "", "rejected": "a"}, "row 1 .*chosen is empty"),
        ({"chosen": "a", "rejected": None}, "row 1 .*rejected must be text"),
        ({"chosen": "a b", "rejected": "a "}, "row 1 .*rejected, after the common prompt, is empty"),
        ({"chosen": "a", "rejected": "b", "margin": float("nan")}, "row 1 .*margin must be a finite number, not nan"),
        ({"chosen": "a", "rejected": "b", "preference": 1.5}, "row 1 .*preference must be the share .*, not 1.5"),
        ({"chosen": "a", "rejected": "b", "preference": -0.1}, "row 1 .*preference must be the share .*, not -0.1"),
        ({"chosen": "a", "rejected": "b", "preference": None}, "row 1 .*preference must be a finite number"),
        ({"chosen": "a", "rejected": "b", "prompt": None}, "row 1 .*prompt must be text"),
    ],
)
def test_errors(char_tokenizer, row, message):
    fine = {"chosen": "y", "rejected": "n", "margin": 1.0, "prompt": "p", "preference": 1.0}
    with pytest.raises(ValueError, match=message):
        make(char_tokenizer, [{key: fine[key] for key in row}, row])


def test_pairs_of_the_same_text_are_left_out_and_counted(char_tokenizer):
    rows = [{"chosen": "y", "rejected": "n"}, {"chosen": "a", "rejected": "a"}, {"chosen": "y", "rejected": "y"}]
    with pytest.warns(UserWarning, match="`data`: in 2 of 3 rows chosen and rejected are the same; they are left out"):
        module = make(char_tokenizer, rows)
    assert [row["chosen"] for row in module.ready("train")] == ["y"]


def test_pairs_that_are_all_of_the_same_text_are_refused(char_tokenizer):
    with pytest.raises(ValueError, match="`data`: chosen and rejected are the same in every row"):
        make(char_tokenizer, [{"chosen": "a", "rejected": "a"}])


def test_an_empty_completion_of_a_prompt_is_its_eos(char_tokenizer):
    module = make(char_tokenizer, [{"prompt": "p", "chosen": "", "rejected": "n"}])
    batch = next(iter(module.train_dataloader()))
    assert batch["loss_mask"].sum(1).tolist() == [1, 2]


def test_mixed_text_and_messages(char_tokenizer):
    with pytest.raises(ValueError, match="chosen and rejected must both be text or both be lists"):
        make(char_tokenizer, [{"chosen": [U, YES], "rejected": "no"}])
    with pytest.raises(ValueError, match="prompt is a list of messages while chosen and rejected are text"):
        make(char_tokenizer, [{"prompt": [U], "chosen": "y", "rejected": "n"}])
    with pytest.raises(ValueError, match="rejected, after the common prompt, is empty"):
        make(char_tokenizer, [{"chosen": [U, YES], "rejected": [U]}])
