"""Unpaired labels: examples, mismatched completions, pairs made to rows, labels, errors."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from lightning_rlhf.datamodules import UnpairedDataModule

U, YES, NO = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "y"},
    {"role": "assistant", "content": "n"},
)
ROWS = [
    {"prompt": "p", "completion": "ab", "label": True},
    {"prompt": "pq", "completion": "d", "label": False},
    {"prompt": "r", "completion": "e", "label": True},
]


def make(tokenizer, rows, ranks=1, rank=0, **kwargs) -> UnpairedDataModule:
    data = rows if isinstance(rows, str) else Dataset.from_list(rows)
    module = UnpairedDataModule(data, tokenizer=tokenizer, **kwargs)
    module.trainer = SimpleNamespace(world_size=ranks, global_rank=rank, lightning_module=None)
    module.prepare_data()
    module.setup("fit")
    return module


def texts(batch) -> list[tuple[str, str]]:
    """(prompt, completion) of all rows of a batch, EOS as `.`; the first half are the examples."""
    found = []
    for ids, kept, target in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["loss_mask"], strict=True):
        assert not (target & ~kept).any()
        parts = ids[kept & ~target], ids[target]
        found.append(tuple("".join(chr(i) if i else "." for i in part.tolist()) for part in parts))
    return found


def in_order(module) -> dict:
    """The rows as one batch, in the order of the data."""
    module.rows["validation"] = module.rows["train"]
    (batch,) = module.val_dataloader()
    return batch


def test_examples_first_then_each_prompt_with_the_next_completion(char_tokenizer):
    found = in_order(make(char_tokenizer, ROWS))
    assert {key: value.tolist() for key, value in found.items()} == {
        "input_ids": [
            [112, 97, 98, 0],  # p  ab
            [112, 113, 100, 0],  # pq d
            [114, 101, 0, 0],  # r  e
            [112, 100, 0, 0],  # p  d
            [112, 113, 101, 0],  # pq e
            [114, 97, 98, 0],  # r  ab
        ],
        "attention_mask": [[1] * 4, [1] * 4, [1, 1, 1, 0], [1, 1, 1, 0], [1] * 4, [1] * 4],
        "loss_mask": [
            [False, True, True, True],
            [False, False, True, True],
            [False, True, True, False],
            [False, True, True, False],
            [False, False, True, True],
            [False, True, True, True],
        ],
        "label": [True, False, True],
    }
    assert [value.dtype for value in found.values()] == [torch.int64, torch.int64, torch.bool, torch.bool]


def test_two_processes_mismatch_as_one_does(char_tokenizer):
    rows = [{"prompt": chr(97 + i), "completion": chr(65 + i), "label": i % 3 == 0} for i in range(10)]

    def epoch(ranks, loader):
        """The steps of an epoch: (prompt, completion) of examples and of mismatches, on all ranks together."""
        modules = [make(char_tokenizer, rows, ranks, rank, batch_size=4 // ranks) for rank in range(ranks)]
        for module in modules:
            module.rows["validation"] = module.rows["train"]
        steps = []
        for parts in zip(*(getattr(module, loader)() for module in modules), strict=True):
            halves = [(texts(part)[: len(part["label"])], texts(part)[len(part["label"]) :]) for part in parts]
            steps.append(tuple(sorted(chain.from_iterable(half)) for half in zip(*halves, strict=True)))
        return steps

    for loader in ("train_dataloader", "val_dataloader"):
        one, two = epoch(1, loader), epoch(2, loader)
        assert one == two
        assert len(one) == 3
        for examples, mismatches in one:
            assert [prompt for prompt, _ in examples] == [prompt for prompt, _ in mismatches]
            assert sorted(answer for _, answer in examples) == sorted(answer for _, answer in mismatches)
            assert not set(examples) & set(mismatches)


def test_training_batches_are_shuffled_and_resume_where_they_stood(char_tokenizer):
    rows = [{"prompt": chr(97 + i), "completion": chr(65 + i), "label": i < 5} for i in range(10)]
    loader = make(char_tokenizer, rows, batch_size=3).train_dataloader()
    batches = [texts(batch) for batch in loader]
    assert sorted(row for batch in batches for row in batch[: len(batch) // 2]) == [
        (row["prompt"], row["completion"] + ".") for row in rows
    ]
    again = make(char_tokenizer, rows, batch_size=3).train_dataloader()
    again.load_state_dict({"batches": 2, "epoch": 0, "of": 4})
    assert [texts(batch) for batch in again] == batches[2:]
    again.batches.set_epoch(1)
    assert [texts(batch) for batch in again] != batches
    assert [p for batch in map(texts, loader) for p, _ in batch] != sorted(p for batch in batches for p, _ in batch)


def test_a_row_that_is_alone_has_no_mismatch(char_tokenizer):
    rows = [*ROWS[:2], {"prompt": "r", "completion": "ef", "label": False}]
    module = make(char_tokenizer, rows, batch_size=2)
    module.rows["validation"] = module.rows["train"]
    alone, both = module.val_dataloader()  # 3 rows in steps of at most 2
    assert texts(alone) == [("p", "ab."), ("pab.", "")]
    assert alone["attention_mask"].tolist() == [[1, 1, 1, 1]] * 2
    assert texts(both) == [("pq", "d."), ("r", "ef."), ("pq", "ef."), ("r", "d.")]


def test_group_by_length_keeps_the_mismatches_within_a_step(char_tokenizer):
    rows = [{"prompt": "p", "completion": "a" * (1 + i // 2) + str(i % 2), "label": i % 2 == 0} for i in range(8)]
    for batch in make(char_tokenizer, rows, batch_size=2, group_by_length=True).train_dataloader():
        found = texts(batch)
        assert {len(answer) for _, answer in found} == {len(found[0][1])}
        assert [answer for _, answer in found[2:]] == [found[1][1], found[0][1]]


def test_pairs_make_two_rows_each(char_tokenizer):
    rows = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}", "margin": 1.0} for i in range(3)]
    found = in_order(make(char_tokenizer, rows))
    assert [answer for _, answer in texts(found)[:6]] == ["c0.", "r1.", "c2.", "r0.", "c1.", "r2."]
    assert [prompt for prompt, _ in texts(found)[:6]] == ["p0", "p1", "p2", "p0", "p1", "p2"]
    assert found["label"].tolist() == [True, False, True, False, True, False]
    assert all(prompt[1] != answer[1] for prompt, answer in texts(found)[6:])  # no mismatch within a pair


def test_pairs_without_a_prompt_and_conversations(char_tokenizer):
    expected = texts(in_order(make(char_tokenizer, [{"prompt": [U], "chosen": [YES], "rejected": [NO]}])))
    assert expected[:2] == [("u>q.\na>", "y."), ("u>q.\na>", "n.")]
    for row in ({"chosen": [U, YES], "rejected": [U, NO]}, {"prompt": "q", "chosen": [U, YES], "rejected": [U, NO]}):
        assert texts(in_order(make(char_tokenizer, [row]))) == expected
    rows = [{"prompt": [U], "completion": [answer], "label": answer is YES} for answer in (YES, NO)]
    assert texts(in_order(make(char_tokenizer, rows))) == expected
    assert texts(in_order(make(char_tokenizer, [{"chosen": "Q A", "rejected": "Q B"}])))[:2] == [
        ("Q", " A."),
        ("Q", " B."),
    ]


def test_a_label_column_decides_even_beside_pairs(char_tokenizer):
    rows = [{**row, "chosen": "x", "rejected": "y"} for row in ROWS]
    assert texts(in_order(make(char_tokenizer, rows))) == texts(in_order(make(char_tokenizer, ROWS)))


def test_labels_are_read_from_what_files_hold(char_tokenizer, tmp_path):
    for good, bad in (("true", "false"), ("True", " FALSE "), ("1", "0")):
        path = tmp_path / f"{good}.csv"
        path.write_text(f"input,output,label\np,ab,{good}\npq,d,{bad}\nr,e,{good}\n")
        assert in_order(make(char_tokenizer, str(path)))["label"].tolist() == [True, False, True]
    for good, bad in ((1, 0), (1.0, 0.0)):
        rows = [{**row, "label": good if row["label"] else bad} for row in ROWS]
        assert in_order(make(char_tokenizer, rows))["label"].tolist() == [True, False, True]


def test_column_flags(char_tokenizer):
    rows = [{"q": row["prompt"], "a": row["completion"], "thumb": row["label"], "label": "no label"} for row in ROWS]
    module = make(char_tokenizer, rows, prompt_column="q", completion_column="a", label_column="thumb")
    assert texts(in_order(module)) == texts(in_order(make(char_tokenizer, ROWS)))
    assert in_order(module)["label"].tolist() == [True, False, True]
    pairs = [{"q": "p", "chosen": "c", "rejected": "r", "prompt": "no"}]
    assert texts(in_order(make(char_tokenizer, pairs, prompt_column="q")))[0] == ("p", "c.")


def test_max_length(char_tokenizer):
    rows = [
        {"prompt": "p", "completion": "abc", "label": True},
        {"prompt": "pppp", "completion": "a", "label": True},  # nothing of the completion is left
        {"prompt": "pp", "completion": "d", "label": False},
    ]
    with pytest.warns(UserWarning, match="3 of 3 rows have more than `max_length`=3 tokens and are cut .*; 1 of them"):
        found = in_order(make(char_tokenizer, rows, max_length=3))
    assert texts(found) == [("p", "ab"), ("pp", "d"), ("p", "d."), ("pp", "a")]


def test_val_share_keeps_a_prompt_on_one_side(char_tokenizer):
    rows = [{"prompt": f"q{i % 10}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(40)]
    module = make(char_tokenizer, rows, val_share=0.5)
    sides = [set(module.ready(split)["prompt"]) for split in ("train", "validation")]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert sum(len(module.ready(split)) for split in ("train", "validation")) == 80


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "a", "label": True}, "`data`: no prompt column"),
        ({"prompt": "a", "label": True}, "`data`: no completion column"),
        ({"prompt": "a", "completion": "b"}, "`data`: no labels to learn from; .*`label_column`.*chosen"),
        ({"prompt": "a", "chosen": "b"}, "`data`: no labels to learn from"),
        ({"prompt": "a", "completion": "", "label": True}, "row 1 .*completion is empty"),
        ({"prompt": None, "completion": "b", "label": True}, "row 1 .*prompt must be text"),
        ({"prompt": "a", "completion": "b", "label": None}, "row 1 .*label must be true or false .*not None"),
        ({"chosen": "a", "rejected": None}, "row 1 .*rejected must be text"),
    ],
)
def test_errors(char_tokenizer, row, message):
    fine = {"prompt": "p", "completion": "c", "label": False, "chosen": "y", "rejected": "n"}
    with pytest.raises(ValueError, match=message):
        make(char_tokenizer, [{key: fine[key] for key in row}, row])


def test_pairs_of_the_same_text_are_left_out(char_tokenizer):
    with pytest.warns(UserWarning, match="`data`: in 1 of 2 rows chosen and rejected are the same"):
        module = make(char_tokenizer, [{"chosen": "y", "rejected": "n"}, {"chosen": "a", "rejected": "a"}])
    assert set(module.ready("train")["completion"]) == {"y", "n"}


@pytest.mark.parametrize("label", ["maybe", "", "2", 2, -1, 0.5])
def test_other_labels_are_refused(char_tokenizer, label):
    with pytest.raises(ValueError, match=r"row 0 .*label must be true or false \(or 1 or 0\), not"):
        make(char_tokenizer, [{"prompt": "p", "completion": "c", "label": label}])


def test_text_and_messages_do_not_mix(char_tokenizer):
    with pytest.raises(ValueError, match="prompt and completion must both be text or both be lists of messages"):
        make(char_tokenizer, [{"prompt": "q", "completion": [YES], "label": True}])


def test_one_kind_of_rows_is_refused(char_tokenizer):
    good, bad = ([{**row, "label": label} for row in ROWS] for label in (1, 0))
    with pytest.raises(ValueError, match=r"`data`: unpaired data with only desirable rows .*; add undesirable ones, "):
        make(char_tokenizer, good)
    with pytest.raises(ValueError, match=r"`data`: unpaired data with only undesirable rows .*; add desirable ones$"):
        make(char_tokenizer, bad)
    module = UnpairedDataModule(Dataset.from_list(good), tokenizer=char_tokenizer)
    module.setup("validate")  # such rows can be evaluated
    assert len(module.rows["train"]) == 3


@pytest.mark.parametrize("name", ["batch_size", "val_batch_size"])
def test_a_batch_needs_a_next_row(char_tokenizer, name):
    sizes = {"batch_size": 2, "val_batch_size": 2} | {name: 1}
    with pytest.raises(ValueError, match=f"`{name}` must be at least 2 in one process, but is 1"):
        make(char_tokenizer, ROWS, **sizes)
    make(char_tokenizer, ROWS, ranks=2, **sizes)  # there it is on the other process
