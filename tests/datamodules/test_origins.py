"""The column of sources: found or named, in the batches of all three kinds, and of no other consequence."""

import pytest
from datasets import Dataset

from lightning_rlhf.datamodules import PreferenceDataModule, RankingDataModule, RatingDataModule, UnpairedDataModule

KINDS = {
    PreferenceDataModule: lambda i: {"prompt": f"q{i}", "chosen": "a" * (1 + i % 7), "rejected": "b"},
    RatingDataModule: lambda i: {"text": "t" * (1 + i % 7) + str(i), "ratings": [float(i % 3)]},
    RankingDataModule: lambda i: {"prompt": f"q{i}", "responses": ["a" * (1 + i % 7), "b"]},
}
WITHOUT_PROMPT = {
    PreferenceDataModule: lambda i: {"chosen": f"{i} a", "rejected": f"x{i} b"},
    RatingDataModule: lambda i: {"prompt": "", "completion": f"{i}", "ratings": [1.0]},
    RankingDataModule: lambda i: {"responses": [f"{i} a", "b"]},
}
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def make(kind, tokenizer, rows, **options):
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    module = kind(data, tokenizer=tokenizer, **options)
    module.setup("fit")
    return module


def batch(*args, **options):
    module = make(*args, **options)
    return module.collate_function()(list(module.ready("train")))


def rows_of(kind, sources, column="source"):
    return [KINDS[kind](i) | {column: source} for i, source in enumerate(sources)]


@every_kind
def test_batches_say_where_their_rows_are_from(kind, char_tokenizer):
    assert "source" not in batch(kind, char_tokenizer, [KINDS[kind](0)])
    assert batch(kind, char_tokenizer, rows_of(kind, ["hh", "web", None]))["source"] == ["hh", "web", ""]
    assert batch(kind, char_tokenizer, rows_of(kind, [3, 1]))["source"] == ["3", "1"]
    named = [row | {"origin": f"o{i}"} for i, row in enumerate(rows_of(kind, ["x", "y"]))]
    assert batch(kind, char_tokenizer, named, source_column="origin")["source"] == ["o0", "o1"]


@every_kind
def test_a_column_that_holds_something_else_is_used_only_if_it_is_named(kind, char_tokenizer):
    many = rows_of(kind, [f"text {i}" for i in range(101)])
    assert "source" not in batch(kind, char_tokenizer, many)
    assert "source" in batch(kind, char_tokenizer, many[:100])
    assert len(batch(kind, char_tokenizer, many, source_column="source")["source"]) == 101
    for other in ([0.5, 1.5], [["a"], ["b"]]):
        assert "source" not in batch(kind, char_tokenizer, rows_of(kind, other))
        with pytest.raises(ValueError, match=r"row 0 .*source must be text or a whole number, not (0\.5|\['a'\])"):
            make(kind, char_tokenizer, rows_of(kind, other), source_column="source")


@every_kind
def test_a_column_that_is_not_there(kind, char_tokenizer):
    with pytest.raises(ValueError, match=r"`data`: no column 'origin' \(`source_column`\); its columns are"):
        make(kind, char_tokenizer, [KINDS[kind](0)], source_column="origin")


@every_kind
def test_sources_decide_neither_the_split_nor_the_order(kind, char_tokenizer):
    for rows in (KINDS, WITHOUT_PROMPT):
        plain = [rows[kind](i) for i in range(40)]
        marked = [row | {"source": "s" * (i * 5 % 11)} for i, row in enumerate(plain)]
        options = dict(val_share=0.5, group_by_length=True, batch_size=4)
        modules = [make(kind, char_tokenizer, data, **options) for data in (plain, marked)]
        for split in ("train", "validation"):
            without = [{k: v for k, v in row.items() if k != "source"} for row in modules[1].ready(split)]
            assert without == list(modules[0].ready(split))
        batches = [[one["input_ids"].tolist() for one in module.train_dataloader()] for module in modules]
        assert batches[0] == batches[1]


def test_pairs_read_as_single_completions_leave_it_out(char_tokenizer):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "source": "hh"}] * 2
    module = make(UnpairedDataModule, char_tokenizer, rows)
    assert set(module.ready("train").column_names) == {"prompt", "completion", "label"}
