import pytest
import torch
from datasets import Dataset

from lightning_rlhf.datamodules import RatingDataModule


def make(tokenizer, data, **kwargs) -> RatingDataModule:
    data = Dataset.from_list(data) if isinstance(data, list) else data
    module = RatingDataModule(data, tokenizer=tokenizer, **kwargs)
    module.prepare_data()
    module.setup("fit")
    return module


def batch(tokenizer, data, **kwargs) -> dict:
    module = make(tokenizer, data, **kwargs)
    return module.collate_function()(list(module.ready("train")))


def test_batch(char_tokenizer):
    found = batch(char_tokenizer, [{"text": "ab", "ratings": [1, -2, 0]}, {"text": "c", "ratings": [3]}])
    assert {key: value.tolist() for key, value in found.items()} == {
        "input_ids": [[97, 98, 0], [99, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "ratings": [[1.0, -2.0, 0.0], [3.0, 0.0, 0.0]],
        "ratings_mask": [[True, True, True], [True, False, False]],  # a rating of 0 is a rating
    }
    assert [value.dtype for value in found.values()] == [torch.int64, torch.int64, torch.float32, torch.bool]


def test_prompt_and_completion_are_joined(char_tokenizer):
    found = batch(char_tokenizer, [{"prompt": "a", "response": "b", "rating": 2}])
    assert found["input_ids"].tolist() == [[97, 98, 0]]
    assert found["ratings"].tolist() == [[2.0]]


def test_ratings_from_csv(char_tokenizer, tmp_path):
    (tmp_path / "d.csv").write_text('text,ratings\na,3\nb,"[1, 2.5]"\n')
    found = batch(char_tokenizer, str(tmp_path / "d.csv"))
    assert found["ratings"].tolist() == [[3.0, 0.0], [1.0, 2.5]]


def test_columns_and_append_eos(char_tokenizer):
    row = {"text": "t", "prompt": "p", "output": "o", "answer": "x", "ratings": [1], "stars": 5}

    def first(**flags):
        found = batch(char_tokenizer, [row], append_eos=False, **flags)
        return "".join(map(chr, found["input_ids"][0].tolist())), found["ratings"].tolist()

    assert first() == ("t", [[1.0]])
    assert first(text_column="answer", ratings_column="stars") == ("x", [[5.0]])
    assert first(completion_column="answer")[0] == "px"
    assert first(prompt_column="answer", completion_column="output")[0] == "xo"


def test_max_length(char_tokenizer):
    with pytest.warns(UserWarning, match="1 of 2 rows have more than `max_length`=3 tokens"):
        found = batch(char_tokenizer, [{"text": "abc", "ratings": 1}, {"text": "d", "ratings": 1}], max_length=3)
    assert found["input_ids"].tolist() == [[97, 98, 99], [100, 0, 0]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "ratings": [1, 5]}, "row 0 .*rating 5.0 is out of range: `rating_min`=-4, `rating_max`=4"),
        ({"text": "a", "ratings": -4.5}, "row 0 .*rating -4.5 is out of range"),
        ({"text": "a", "ratings": [float("nan")]}, "row 0 .*each of the ratings must be a finite number, not nan"),
        ({"text": "a", "ratings": []}, "row 0 .*ratings is empty: at least one rater"),
        ({"text": "a", "ratings": None}, "row 0 .*finite number, not None"),
        ({"text": "a", "ratings": "[1, x]"}, r"row 0 .*must be a list of numbers, not '\[1, x\]'"),
        ({"text": "", "ratings": 1}, "row 0 .*text is empty"),
        ({"text": "a"}, r"no ratings column \(looked for ratings, rating\)"),
        ({"body": "a", "ratings": 1}, "no text that the ratings belong to; its columns are"),
        ({"prompt": "a", "completion": "", "ratings": 1}, "row 0 .*completion is empty"),
        ({"prompt": "a", "completion": [{"role": "r", "content": "c"}], "ratings": 1}, "both be text or both be lists"),
    ],
)
def test_errors(char_tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        make(char_tokenizer, [row], rating_min=-4, rating_max=4)


def test_range_is_checked_only_if_given(char_tokenizer):
    make(char_tokenizer, [{"text": "a", "ratings": 99}])
    make(char_tokenizer, [{"text": "a", "ratings": 4}], rating_max=4)
    with pytest.raises(ValueError, match="out of range"):
        make(char_tokenizer, [{"text": "a", "ratings": 99}], rating_max=4)
    with pytest.raises(ValueError, match="`rating_min`=2 must be less than `rating_max`=1"):
        make(char_tokenizer, [{"text": "a", "ratings": 1}], rating_min=2, rating_max=1)
    with pytest.raises(ValueError, match="give `text_column`, or `prompt_column` and `completion_column`"):
        make(char_tokenizer, [{"text": "a", "ratings": 1}], text_column="text", prompt_column="text")
