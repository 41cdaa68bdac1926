import json

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_rlhf.callbacks import JSONLinesWriter
from lightning_rlhf.callbacks._shared import write_atomically
from lightning_rlhf.callbacks.predictions import in_data_order, json_lines


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
