import datasets
import pytest
from datasets import Dataset, DatasetDict

from lightning_rlhf.datamodules.sources import fetch_source, find_column, is_local, iterate, load_source

ROWS = [{"a": "x", "b": 1}, {"a": "y", "b": 2}]


def test_formats_agree(tmp_path):
    import json

    (tmp_path / "1.jsonl").write_text('{"a": "x", "b": 1}\n\n{"a": "y", "b": 2}\n')
    (tmp_path / "2.json").write_text(json.dumps(ROWS))
    (tmp_path / "3.json").write_text('{"a": "x", "b": 1}\n{"a": "y", "b": 2}')
    Dataset.from_list(ROWS).to_parquet(tmp_path / "4.parquet")
    (tmp_path / "5.csv").write_text('a,b\r\nx,1\r\n"y",2\r\n')
    for path in sorted(tmp_path.iterdir())[:4]:
        assert load_source(str(path))["train"].to_list() == ROWS, path
    as_text = [{"a": "x", "b": "1"}, {"a": "y", "b": "2"}]  # CSV has no types
    assert load_source(str(tmp_path / "5.csv"))["train"].to_list() == as_text


def test_a_field_that_only_later_rows_have(write_jsonl):
    assert load_source(write_jsonl({"a": 1}, {"a": 2, "b": "x"}))["train"].to_list() == [
        {"a": 1, "b": None},
        {"a": 2, "b": "x"},
    ]


def test_csv_quoting_long_fields_and_bom(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('\ufeffa,b\n"one, two\nlines",' + "z" * 200_000 + "\n", encoding="utf-8")
    (row,) = load_source(str(path))["train"]
    assert row == {"a": "one, two\nlines", "b": "z" * 200_000}


def test_line_separators_inside_json_strings(write_jsonl, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"a": "x\u2028y"}\n', encoding="utf-8")
    assert load_source(str(tmp_path / "d.jsonl"))["train"]["a"][:] == ["x\u2028y"]


def test_splits(write_jsonl, tmp_path):
    one, two = Dataset.from_list(ROWS), Dataset.from_list(ROWS[:1])
    assert list(load_source(one)) == ["train"]
    assert list(load_source(DatasetDict(test=one))) == ["train"]
    named = load_source(DatasetDict(train=one, val=two, extra=two))
    assert {name: len(rows) for name, rows in named.items()} == {"train": 2, "validation": 1}
    with pytest.raises(ValueError, match=r"none of its splits \['a', 'b'\] is called train"):
        load_source(DatasetDict(a=one, b=two))


def test_folder(write_jsonl, tmp_path):
    write_jsonl({"a": "1"}, name="plain/x.jsonl")
    write_jsonl({"a": "2"}, name="plain/y.jsonl")
    (tmp_path / "plain" / "README.md").write_text("not data")
    assert load_source(str(tmp_path / "plain"))["train"]["a"][:] == ["1", "2"]
    for name in ("train-0", "train-1", "val", "test"):
        write_jsonl({"a": name}, name=f"named/{name}.jsonl")
    assert {split: rows["a"][:] for split, rows in load_source(str(tmp_path / "named")).items()} == {
        "train": ["train-0", "train-1"],
        "validation": ["val"],
        "test": ["test"],
    }
    write_jsonl({"a": "?"}, name="named/more.jsonl")
    with pytest.raises(ValueError, match=r"more.jsonl: the name says no split"):
        load_source(str(tmp_path / "named"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="the folder holds no"):
        load_source(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"a": 1}\n{"a": \n', r"d.jsonl, line 2: not valid JSON"),
        ("d.json", '[{"a": 1},\n{"a": ]', r"d.json, line 2: not valid JSON"),
        ("d.jsonl", '{"a": 1}\n3\n', r"d.jsonl, line or item 2: expected a JSON object"),
        ("d.jsonl", "", "d.jsonl: the file has no rows"),
        ("d.csv", "a,b\n", "d.csv: the file has no rows"),
        ("d.csv", "a,b\n1,2\n1,2,3\n", r"d.csv, line 3: expected 2 fields"),
        ("d.csv", "a,b\n1\n", r"d.csv, line 2: expected 2 fields"),
        ("d.csv", 'a,b\n"1"x,2\n', r"d.csv, line 2: not valid CSV"),
        ("d.jsonl", '{"a": 1}\n{"a": "x"}\n', "d.jsonl: no table, or a column mixes types"),
        ("d.parquet", "nonsense", "d.parquet: no table"),
        ("d.txt", "hello", r"d.txt: cannot read a .txt file; expected one of .jsonl"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_source(str(tmp_path / name))


def test_not_utf8(tmp_path):
    (tmp_path / "d.csv").write_bytes(b"a\n\xe9\n")
    with pytest.raises(ValueError, match=r"d\.csv: not UTF-8 text"):
        load_source(str(tmp_path / "d.csv"))


def test_missing_and_empty(tmp_path):
    with pytest.raises(ValueError, match=r"gone.jsonl: there is no such file or folder; check `val_data`"):
        load_source("gone.jsonl", "val_data")
    with pytest.raises(ValueError, match="`data`: the train data has no rows"):
        load_source(Dataset.from_dict({"a": []}))
    with pytest.raises(ValueError, match="must be a string, a Dataset or a DatasetDict, not list"):
        load_source(ROWS)


def test_hub(monkeypatch):
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub")
        if config is None:
            raise ValueError("Config name is missing")
        return DatasetDict(train=Dataset.from_list(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_source("openai/gsm8k:main")["train"]) == 2
    fetch_source("openai/gsm8k:main", "data")
    assert asked == [("openai/gsm8k", "main")] * 2
    with pytest.raises(
        ValueError, match=r"`data`: 'no/such' is neither an existing file or folder nor a reachable hub"
    ):
        load_source("no/such")
    with pytest.raises(ValueError, match=r"Config name is missing\); a config is given as owner/name:config"):
        load_source("openai/gsm8k")


def test_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert all(map(is_local, ["here", "x.jsonl", "a/b.csv", "/data/x", "./x", "~/x", "a/b/c"]))
    assert not any(map(is_local, ["owner/name", "squad", "owner/name:config"]))


def test_find_column():
    def columns(*names):
        return Dataset.from_dict({name: ["x"] for name in names})

    assert find_column(columns("text", "input"), "prompt", None, "f") == "input"
    assert find_column(columns("input", "prompt"), "prompt", None, "f") == "prompt"
    assert find_column(columns("mine", "prompt"), "prompt", "mine", "f") == "mine"
    assert find_column(columns("text"), "prompt", None, "f", required=False) is None
    with pytest.raises(ValueError, match=r"f: no column 'mine' \(`prompt_column`\); its columns are \['text'\]"):
        find_column(columns("text"), "prompt", "mine", "f")
    with pytest.raises(
        ValueError, match=r"f: no prompt column \(looked for prompt, input.*\['text'\].*`prompt_column`"
    ):
        find_column(columns("text"), "prompt", None, "f")
    with pytest.raises(ValueError, match=r"\['input', 'instruction'\] could each be the prompt"):
        find_column(columns("instruction", "input"), "prompt", None, "f")


def test_iterate_keeps_rows_together():
    assert list(iterate(Dataset.from_list(ROWS))) == ROWS
