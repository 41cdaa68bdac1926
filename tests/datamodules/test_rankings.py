import json

import pytest
from datasets import Dataset

from lightning_rlhf.datamodules import RankingDataModule

U, YES, NO = ({"role": role, "content": text} for role, text in (("user", "u"), ("assistant", "y"), ("assistant", "n")))


def make(tokenizer, data, **kwargs) -> RankingDataModule:
    data = Dataset.from_list(data) if isinstance(data, list) else data
    module = RankingDataModule(data, tokenizer=tokenizer, **kwargs)
    module.prepare_data()
    module.setup("fit")
    return module


def batch(tokenizer, data, **kwargs) -> dict:
    module = make(tokenizer, data, **kwargs)
    return module.collate_function()(list(module.ready("train")))


def texts(found: dict) -> list[str]:
    rows = zip(found["input_ids"], found["attention_mask"].bool(), strict=True)
    return ["".join(map(chr, ids[mask].tolist())).replace("\0", "$") for ids, mask in rows]


def test_batch(char_tokenizer):
    rows = [
        {"prompt": "p", "responses": ["a", "bc", "d"], "ranks": [2, 1, 2]},
        {"prompt": "qq", "responses": ["e", "f"], "ranks": [1, 4]},
    ]
    found = batch(char_tokenizer, rows)
    assert {key: value.tolist() for key, value in found.items()} == {
        "input_ids": [
            [112, 97, 0, 0],
            [112, 98, 99, 0],
            [112, 100, 0, 0],
            [113, 113, 101, 0],
            [113, 113, 102, 0],
        ],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]],
        "group": [0, 0, 0, 1, 1],
        "rank": [2, 1, 2, 1, 4],
    }
    assert [str(value.dtype) for value in found.values()] == ["torch.int64"] * 3 + ["torch.float32"]


def test_without_ranks_the_best_comes_first(char_tokenizer):
    found = batch(char_tokenizer, [{"prompt": "p", "responses": ["a", "b", "c"]}])
    assert found["rank"].tolist() == [1, 2, 3]


def test_without_a_prompt_responses_are_whole_texts(char_tokenizer, bos_tokenizer):
    assert texts(batch(char_tokenizer, [{"responses": ["ab", "ac"]}])) == ["ab$", "ac$"]
    assert texts(batch(bos_tokenizer, [{"responses": ["ab", "ac"]}])) == ["\2ab$", "\2ac$"]


def test_messages(char_tokenizer):
    row = {"prompt": [U], "responses": [[YES], [NO]]}
    assert texts(batch(char_tokenizer, [row])) == ["u>u$\na>y$", "u>u$\na>n$"]
    whole = {"responses": [[U, YES], [U, NO]]}  # the turn that all share is the prompt
    assert texts(batch(char_tokenizer, [whole])) == ["u>u$\na>y$", "u>u$\na>n$"]
    assert make(char_tokenizer, [whole]).identity(whole) == [U]


def test_csv_with_json_in_its_cells(char_tokenizer, tmp_path):
    (tmp_path / "d.csv").write_text('prompt,responses,ranks\np,"[""a"", ""b""]","[2, 1]"\n')
    found = batch(char_tokenizer, str(tmp_path / "d.csv"))
    assert texts(found) == ["pa$", "pb$"]
    assert found["rank"].tolist() == [2, 1]


def test_columns(char_tokenizer):
    row = {"prompt": "p", "q": "q", "responses": ["a", "b"], "texts": ["c", "d"], "ranks": [1, 2], "place": [2, 1]}

    def first(**flags):
        found = batch(char_tokenizer, [row], **flags)
        return texts(found), found["rank"].tolist()

    assert first() == (["pa$", "pb$"], [1, 2])
    assert first(prompt_column="q")[0] == ["qa$", "qb$"]
    assert first(responses_column="texts")[0] == ["pc$", "pd$"]
    assert first(ranks_column="place")[1] == [2, 1]


def test_responses_that_are_objects(char_tokenizer, write_jsonl):
    answers = [{"answer": "a", "model": "m", "rank": 3.0}, {"answer": "b", "model": "n", "rank": 1.0}]
    path = write_jsonl({"prompt": "p", "answers": answers, "ranks": [5, 6]})
    flags = {"responses_column": "answers", "response_field": "answer"}
    found = batch(char_tokenizer, path, **flags, rank_field="rank")
    assert texts(found) == ["pa$", "pb$"]
    assert found["rank"].tolist() == [3, 1]
    assert batch(char_tokenizer, path, **flags)["rank"].tolist() == [5, 6]
    with pytest.raises(ValueError, match="each response must be an object with the field 'text', not "):
        make(char_tokenizer, path, responses_column="answers", response_field="text")
    with pytest.raises(ValueError, match="`rank_field` goes with `response_field`, and takes the place of"):
        make(char_tokenizer, path, rank_field="rank")
    with pytest.raises(ValueError, match="takes the place of `ranks_column`"):
        make(char_tokenizer, path, **flags, rank_field="rank", ranks_column="ranks")


def test_max_length(char_tokenizer):
    rows = [
        {"prompt": "p", "responses": ["abc", "d", "e"]},
        {"prompt": "p", "responses": ["aax", "aay"]},  # equal within the limit
        {"prompt": "p", "responses": ["aax", "aay", "b"], "ranks": [2, 1, 1]},  # the first and the third still differ
        {"prompt": "p", "responses": ["aax", "b", "c"], "ranks": [1, 2, 2]},
        {"prompt": "pppp", "responses": ["a", "b"]},  # nothing of the responses is left
    ]
    for row in rows:
        row.setdefault("ranks", list(range(1, len(row["responses"]) + 1)))
    with pytest.warns(UserWarning, match="5 of 5 rows have more than `max_length`=3 tokens .*; 2 of them"):
        found = batch(char_tokenizer, rows, max_length=3)
    assert texts(found) == ["pab", "pd$", "pe$", "paa", "paa", "pb$", "paa", "pb$", "pc$"]
    assert found["group"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_lists_whose_responses_are_equal_within_the_limit_are_left_out(char_tokenizer):
    rows = [
        {"prompt": "p", "responses": ["aax", "aay", "b"], "ranks": [1, 2, 2]},
        {"prompt": "p", "responses": ["aax", "aay", "aaz"], "ranks": [1, 2, 2]},
    ]
    with pytest.warns(UserWarning, match="2 of 2 rows .*; 1 of them"):
        found = batch(char_tokenizer, rows, max_length=3)
    assert texts(found) == ["paa", "paa", "pb$"]


def test_lists_of_one_prompt_stay_on_one_side(char_tokenizer):
    rows = [{"prompt": f"q{i % 10}", "responses": [f"a{i}", "b"]} for i in range(40)]
    module = make(char_tokenizer, rows, val_share=0.5)
    sides = [{row["prompt"] for row in module.ready(split)} for split in ("train", "validation")]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_a_batch_is_batch_size_lists_and_lists_of_like_length_come_together(char_tokenizer):
    rows = [{"prompt": "p", "responses": ["a" * (1 + 20 * (i % 2)), "b"]} for i in range(32)]
    module = make(char_tokenizer, rows, batch_size=4, group_by_length=True)
    batches = list(module.train_dataloader())
    assert [int(one["group"].max()) + 1 for one in batches] == [4] * 8
    assert sorted(one["input_ids"].shape[1] for one in batches) == [3] * 4 + [23] * 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, r"no responses column \(looked for responses\)"),
        ({"responses": ["a"], "ranks": [1]}, "row 1 .*responses must hold at least 2 to compare, but holds 1"),
        (
            {"responses": ["a", "b"], "ranks": [1]},
            "row 1 .*one for each of the 2 responses, but holds 1",
        ),
        ({"responses": ["a", "b"], "ranks": [2, 2]}, "row 1 .*ranks are all 2: ties only"),
        ({"responses": ["a", "b"], "ranks": [1, None]}, "row 1 .*each of the ranks must be a finite number, not None"),
        ({"responses": ["a", "b"], "ranks": None}, "row 1 .*ranks must be a list, not None"),
        ({"responses": ["a", " "], "ranks": [1, 2]}, "row 1 .*each response is empty"),
        ({"responses": ["a", None], "ranks": [1, 2]}, "row 1 .*each response must be text or a list of messages"),
        ({"responses": None, "ranks": [1, 2]}, "row 1 .*responses must be a list, not None"),
        ({"responses": ["a", "b"], "ranks": [1, 2], "prompt": None}, "row 1 .*prompt must be text"),
    ],
)
def test_errors(char_tokenizer, row, message):
    fine = {"responses": ["y", "n"], "ranks": [1.0, 2.0], "prompt": "p"}
    with pytest.raises(ValueError, match=message):
        make(char_tokenizer, [{key: fine[key] for key in row}, row])


def test_cells_that_are_no_lists(char_tokenizer, write_jsonl):
    for value, message in (("a, b", "responses must be a list, not 'a, b'"), ("[a, b]", "but is no valid JSON")):
        with pytest.raises(ValueError, match=message):
            make(char_tokenizer, write_jsonl({"responses": value}))
    assert batch(char_tokenizer, write_jsonl({"responses": json.dumps(["a", "b"])}))["rank"].tolist() == [1, 2]


def test_mixed_text_and_messages(char_tokenizer, write_jsonl):
    message = "prompt and responses must all be text or all be lists of messages"
    for row in ({"prompt": "p", "responses": [[YES], [NO]]}, {"prompt": [U], "responses": ["y", "n"]}):
        with pytest.raises(ValueError, match=message):
            make(char_tokenizer, write_jsonl(row))
