import json

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_rlhf.callbacks import JSONLinesWriter
from lightning_rlhf.callbacks._shared import write_atomically
from lightning_rlhf.callbacks.predictions import in_data_order, json_lines
from lightning_rlhf.loaders import EvenBatches, ResumableLoader, Rows


def predict(module, root, data):
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=root,
        callbacks=[JSONLinesWriter()],
    )
    trainer.predict(module, data, return_predictions=False)
    return [json.loads(line) for line in (root / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture
def module(fit):
    return fit([], max_epochs=1)[0]


def test_rows_in_data_order(module, tmp_path, capsys):
    rows = predict(module, tmp_path, DataLoader(TensorDataset(torch.tensor([0, 1, 2, 3])), batch_size=2))
    assert rows == [
        {"prompt": prompt, "reward": float(i), "score": None}
        for i, prompt in enumerate(["The film", "An actor", "One | two", "Lines"])
    ]
    assert f"4 predictions in {tmp_path / 'predictions.jsonl'}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("predictions*")] == ["predictions.jsonl"]


@pytest.mark.parametrize("per_sample", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_even_batches_of_two_ranks(module, tmp_path, monkeypatch, per_sample, num_workers):
    module.predict_step = lambda batch, batch_idx: {"text": [f"{i}{c}" for i in batch for c in "ab"[:per_sample]]}
    parts = []
    monkeypatch.setattr("lightning_rlhf.callbacks.predictions.of_all_ranks", lambda rows: parts.append(rows) or parts)
    for rank in (0, 1):  # 7 rows: rank 0 has 0 2 | 4 6, rank 1 has 1 | 3 5
        loader = ResumableLoader(
            Rows(range(7)), EvenBatches(7, 2, 2, rank, shuffle=False), collate_fn=list, num_workers=num_workers
        )
        rows = predict(module, tmp_path, loader)
        assert len(rows) == [4, 7][rank] * per_sample
    assert [row["text"] for row in rows] == [f"{i}{c}" for i in range(7) for c in "ab"[:per_sample]]


def test_several_loaders(module, tmp_path):
    module.predict_step = lambda batch, batch_idx, dataloader_idx: {"text": [f"{dataloader_idx}{i}" for i in batch]}
    module.on_predict_batch_start = lambda batch, batch_idx, dataloader_idx: None
    even = [ResumableLoader(Rows(range(n)), EvenBatches(n, 2, 1, 0, False), collate_fn=list) for n in (3, 2)]
    plain = DataLoader([0, 1, 2], batch_size=2, collate_fn=list)
    rows = predict(module, tmp_path, [even[0], plain, even[1]])
    assert [row["text"] for row in rows] == ["00", "01", "02", "10", "11", "12", "20", "21"]


def test_loader_with_an_order_of_its_own(module, tmp_path):
    module.predict_step = lambda batch, batch_idx: {"text": batch}
    rows = predict(module, tmp_path, DataLoader("abc", batch_size=2, sampler=[2, 0, 1], collate_fn=list))
    assert [row["text"] for row in rows] == ["a", "b", "c"]


def test_loader_without_indices(module, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from "abc"

    module.predict_step = lambda batch, batch_idx: {"text": batch}
    rows = predict(module, tmp_path, DataLoader(Stream(), batch_size=2, collate_fn=list))
    assert [row["text"] for row in rows] == ["a", "b", "c"]


def test_several_rows_per_sample(module, tmp_path):
    module.predict_step = lambda batch, batch_idx: {"text": [f"{i}{c}" for i in batch[0].tolist() for c in "ab"]}
    rows = predict(module, tmp_path, DataLoader(TensorDataset(torch.tensor([0, 1, 2])), batch_size=2))
    assert [row["text"] for row in rows] == ["0a", "0b", "1a", "1b", "2a", "2b"]


def test_two_ranks_interleave_and_repeats_go():
    # 3 samples on 2 ranks: rank 1's last is sample 0 again, to fill the round.
    parts = [[(0, 0, 0, "a"), (0, 2, 0, "c")], [(0, 1, 0, "b"), (0, 0, 0, "a again")]]
    assert in_data_order(parts) == ["a", "b", "c"]


def test_json_lines():
    columns = {"text": ["ä\n", "b"], "score": torch.tensor([1.5, float("inf")])}
    assert json_lines(columns) == ['{"text": "ä\\n", "score": 1.5}', '{"text": "b", "score": null}']
    with pytest.raises(ValueError, match="dict of columns"):
        json_lines(torch.zeros(2))


def test_failed_write_leaves_old_file(tmp_path):
    path = tmp_path / "file.jsonl"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
