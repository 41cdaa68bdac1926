import csv
import json
import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from lightning_rlhf.callbacks import SampleTable


def rows_of(path):
    with (path / "samples.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_file_holds_first_samples_of_every_iteration(fit, tmp_path):
    fit([SampleTable(num_samples=2)])
    rows = rows_of(tmp_path)
    assert [(row["iteration"], row["response"]) for row in rows] == [
        ("0", "text 0, level\n0"),
        ("0", "text 1, level\n0"),
        ("1", "text 0, level\n1"),
        ("1", "text 1, level\n1"),
    ]
    assert list(rows[0]) == ["iteration", "prompt", "response", "reward", "kl", "length", "ended", "reward/vader"]


def test_every_n_epochs(fit, tmp_path):
    fit([SampleTable(every_n_epochs=2, num_samples=1)], max_epochs=3)
    assert [row["iteration"] for row in rows_of(tmp_path)] == ["0", "2"]


def test_resumed_run_continues_file_without_repeats(fit, tmp_path):
    keep_all = {"dirpath": tmp_path, "filename": "{epoch}", "save_top_k": -1}
    fit([SampleTable(num_samples=1), ModelCheckpoint(**keep_all)], enable_checkpointing=True)
    # the first run also did iteration 1, after the checkpoint from which the second starts
    fit([SampleTable(num_samples=1)], max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert [row["iteration"] for row in rows_of(tmp_path)] == ["0", "1", "2"]


def test_fresh_run_replaces_file(fit, tmp_path):
    fit([SampleTable(num_samples=1)], max_epochs=2)
    fit([SampleTable(num_samples=1)], max_epochs=1)
    assert [row["iteration"] for row in rows_of(tmp_path)] == ["0"]


def test_module_without_samples_is_left_alone(fit, tmp_path):
    class Offline(type(fit([], max_epochs=1)[0])):
        def on_train_epoch_start(self):
            pass

    fit([SampleTable()], max_epochs=1, module=Offline())
    assert not (tmp_path / "samples.csv").exists()


def test_every_n_epochs_must_be_positive():
    with pytest.raises(ValueError, match="`every_n_epochs`"):
        SampleTable(every_n_epochs=0)


def test_offline_wandb_run_keeps_every_iteration_and_draws_nothing(fit, tmp_path, monkeypatch):
    for name, value in {"WANDB_SILENT": "true", "WANDB_MODE": "offline", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    bare, _ = fit([], max_epochs=3)
    logger = WandbLogger(offline=True, save_dir=tmp_path, project="test")
    watched, _ = fit([SampleTable(num_samples=2)], max_epochs=3, logger=logger)
    state = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    logger.experiment.finish()
    assert watched.trace == bare.trace
    assert (random.getstate(), np.random.get_state()[2]) == state[:2]

    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/samples/*.table.json"))
    assert [path.name.split("_")[1] for path in tables] == ["0", "1", "2"]
    last = json.loads(tables[2].read_text())
    assert last["columns"][:3] == ["iteration", "prompt", "response"]
    assert [row[:3] for row in last["data"]] == [
        [2, "The film", "text 0, level\n2"],
        [2, "An actor", "text 1, level\n2"],
    ]
