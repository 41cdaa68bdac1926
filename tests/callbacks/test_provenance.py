"""run.json over a run's life: it begins, it ends in one way or another, it is resumed."""

import json

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlhf.callbacks.provenance import Provenance


def record(folder) -> dict:
    return json.loads((folder / "run.json").read_text())


class Do(L.Callback):
    """Calls a function when an epoch begins."""

    def __init__(self, function):
        self.function = function

    def on_train_epoch_start(self, trainer, pl_module):
        self.function(trainer)


def test_a_run_is_recorded_from_its_start_to_its_end(fit, tmp_path):
    seen = []
    _, trainer = fit([Provenance(), Do(lambda _: seen.append(record(tmp_path)))])
    first, last = seen[0], record(tmp_path)
    assert first["status"] == "running"
    assert "seconds" not in first
    assert (last["status"], last["error"], last["module"]) == ("finished", None, "FakePPO")
    assert (last["iterations"], last["optimizer_steps"]) == (2, trainer.global_step)
    assert (last["seed"], last["world_size"], last["resumed_from"], last["sessions"]) == (1, 1, None, [])
    assert last["seconds"] > 0
    assert last["peak_memory_gib"] > 0.01
    assert last["versions"]["lightning"] == L.__version__
    assert all(last[name] == value for name, value in first.items() if name != "status")


def raises(error):
    def function(trainer):
        if trainer.current_epoch == 1:
            raise error

    return function


@pytest.mark.parametrize(
    ("error", "caught", "status", "said"),
    [
        (RuntimeError("bad luck\nat https://me:pw@host"), RuntimeError, "failed", "RuntimeError: bad luck"),
        (ValueError("no https://me:pw@host"), ValueError, "failed", "ValueError: no https://***@host"),
        (KeyboardInterrupt(), SystemExit, "stopped", "KeyboardInterrupt"),
    ],
)
def test_how_a_run_ended_is_recorded(error, caught, status, said, fit, tmp_path):
    with pytest.raises(caught):
        fit([Provenance(), Do(raises(error))])
    found = record(tmp_path)
    assert (found["status"], found["error"], found["iterations"]) == (status, said, 1)
    assert found["seconds"] > 0


def resumed(fit, tmp_path, **options):
    keeper = ModelCheckpoint(tmp_path, "kept", save_on_train_epoch_end=True, enable_version_counter=False)
    return fit([Provenance(), keeper], enable_checkpointing=True, **options)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_keeps_the_sessions_before_it(fit, tmp_path):
    resumed(fit, tmp_path, max_epochs=1)
    first = record(tmp_path)
    resumed(fit, tmp_path, max_epochs=2, ckpt_path=tmp_path / "kept.ckpt")
    second = record(tmp_path)
    assert second["resumed_from"] == str(tmp_path / "kept.ckpt")
    assert second["sessions"] == [{name: value for name, value in first.items() if name != "sessions"}]
    (tmp_path / "run.json").write_text(json.dumps(second | {"status": "running"}))  # as SIGKILL leaves it
    resumed(fit, tmp_path, max_epochs=3, ckpt_path=tmp_path / "kept.ckpt")
    third = record(tmp_path)
    assert [session["status"] for session in third["sessions"]] == ["finished", "killed"]
    assert [session["iterations"] for session in third["sessions"]] == [1, 2]
    resumed(fit, tmp_path, max_epochs=1)  # a new run
    assert record(tmp_path)["sessions"] == []


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_that_fails_before_its_training_loses_no_record(fit, tmp_path):
    resumed(fit, tmp_path, max_epochs=1)
    with pytest.raises(FileNotFoundError):
        resumed(fit, tmp_path, ckpt_path=tmp_path / "nowhere.ckpt")
    found = record(tmp_path)
    assert (found["status"], found["iterations"]) == ("failed", 0)
    assert [session["status"] for session in found["sessions"]] == ["finished"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("content", [None, "", "[]", "{}", "no json"])
def test_a_record_that_cannot_be_read_does_not_stop_a_resumed_run(content, fit, tmp_path):
    resumed(fit, tmp_path, max_epochs=1)
    (tmp_path / "run.json").unlink() if content is None else (tmp_path / "run.json").write_text(content)
    resumed(fit, tmp_path, ckpt_path=tmp_path / "kept.ckpt")
    assert record(tmp_path)["sessions"] == []


def test_a_full_disk_does_not_stop_the_run(fit, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("lightning_rlhf.callbacks.provenance.write_atomically", fail)
    with pytest.warns(UserWarning, match=r"run.json` cannot be written: no space left"):
        _, trainer = fit([Provenance()])
    assert trainer.current_epoch == 2


def test_other_stages_leave_the_record_alone(fit, tmp_path):
    callback = Provenance()
    module, trainer = fit([callback])
    before = record(tmp_path)
    trainer.validate(module, trainer.val_dataloaders, verbose=False)
    assert record(tmp_path) == before
