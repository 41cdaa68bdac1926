import csv
import errno
import random

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from offline_wandb import OfflineRun

from lightning_rlhf.callbacks.samples import RowFile, SampleTable, parsed
from lightning_rlhf.loggers import append_rows


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


@pytest.fixture
def wandb_logger(tmp_path, monkeypatch):
    for name, value in {"WANDB_SILENT": "true", "WANDB_MODE": "offline", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    return WandbLogger(offline=True, save_dir=tmp_path, project="test")


def test_offline_wandb_run_has_the_rows_of_every_iteration_in_one_table_and_draws_nothing(fit, tmp_path, wandb_logger):
    bare, _ = fit([], max_epochs=3)
    watched, _ = fit([SampleTable(num_samples=2)], max_epochs=3, logger=wandb_logger)
    state = random.getstate(), np.random.get_state()[2]
    wandb_logger.experiment.finish()
    assert watched.trace == bare.trace
    assert (random.getstate(), np.random.get_state()[2]) == state
    tables = OfflineRun(tmp_path).tables("samples/rollouts")
    assert [len(table["data"]) for table in tables] == [2, 4, 6]
    assert tables[-1]["columns"] == [
        "iteration", "prompt", "response", "reward", "kl", "length", "ended", "reward/vader"
    ]  # fmt: skip
    assert tables[-1]["data"] == [
        [level, prompt, f"text {i}, level\n{level}", level + i, 0.5 * level, 3, True, pytest.approx(0.1 * level)]
        for level in range(3)
        for i, prompt in enumerate(["The film", "An actor"])
    ]


def test_a_resumed_wandb_run_has_the_iterations_before_it_too(fit, tmp_path, wandb_logger):
    keep_all = {"dirpath": tmp_path, "filename": "{epoch}", "save_top_k": -1}
    fit([SampleTable(num_samples=1), ModelCheckpoint(**keep_all)], enable_checkpointing=True)
    fit([SampleTable(num_samples=1)], max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt", logger=wandb_logger)
    wandb_logger.experiment.finish()
    assert [row[0] for row in OfflineRun(tmp_path).tables("samples/rollouts")[-1]["data"]] == [0, 1, 2]


def test_full_disk_is_a_warning_and_later_iterations_are_written(fit, tmp_path, monkeypatch):
    bare, _ = fit([], max_epochs=3)
    table = SampleTable(num_samples=1)

    class Disk(L.Callback):
        """Full during iteration 1."""

        def on_train_epoch_start(self, trainer, pl_module):
            monkeypatch.setattr("lightning_rlhf.callbacks.samples.append_rows", append_rows)
            if trainer.current_epoch == 1:
                monkeypatch.setattr("lightning_rlhf.callbacks.samples.append_rows", no_space)

    with pytest.warns(UserWarning, match=r"samples\.csv cannot be written.*No space left"):
        watched, _ = fit([Disk(), table], max_epochs=3)
    assert [row["iteration"] for row in rows_of(tmp_path)] == ["0", "2"]
    assert watched.trace == bare.trace


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


class TestRowFile:
    def test_new_columns_widen_it(self, tmp_path):
        file = RowFile(tmp_path / "x.csv", key="step")
        file.add([{"step": 0, "a": 1}])
        file.add([{"step": 3, "a": None, "b": True}])
        file.add([{"step": 5, "b": 0.5}])
        assert file.count == 3
        assert list(file.rows()) == [
            {"step": 0, "a": 1, "b": None},
            {"step": 3, "a": None, "b": True},
            {"step": 5, "a": None, "b": 0.5},
        ]

    def test_texts_stay_texts(self, tmp_path):
        file = RowFile(tmp_path / "x.csv", key="step")
        row = {"step": 0, "prompt": "True", "response": '12,\n"quoted"', "reference_response": "", "name": "abc"}
        file.add([row])
        assert list(file.rows()) == [row]

    def test_rows_can_be_chosen(self, tmp_path):
        file = RowFile(tmp_path / "x.csv", key="step")
        file.add([{"step": 0, "a": i} for i in range(3)])
        assert [row["a"] for row in file.rows(lambda row: row["a"] != "1")] == [0, 2]


@pytest.mark.parametrize(
    ("text", "value"),
    [("", None), ("True", True), ("False", False), ("3", 3), ("-0.5", -0.5), ("1e-3", 0.001), ("a", "a")],
)
def test_parsed(text, value):
    assert parsed(text) == value
    assert type(parsed(text)) is type(value)
