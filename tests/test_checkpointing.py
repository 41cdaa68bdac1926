"""Checkpoints are whole or absent, whatever happens while they are written."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.api import CheckpointException

from lightning_rlhf import checkpointing
from lightning_rlhf.checkpointing import AtomicCheckpointIO, load_folder, recover, save_folder, settle

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # DCP, when there is one process
]


def checkpoint(value: float) -> dict:
    """As of Lightning, with an optimizer that has made a step."""
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {"epoch": 4, "state_dict": state, "optimizer_states": [optimizer.state_dict()], "kl": [1.5, None]}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert (found["epoch"], found["kl"]) == (expected["epoch"], expected["kl"])
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], tensor)
    (optimizer,), (other,) = found["optimizer_states"], expected["optimizer_states"]
    assert optimizer["param_groups"] == other["param_groups"]
    assert optimizer["state"].keys() == other["state"].keys() == {0, 1}
    for number, state in other["state"].items():
        assert all(torch.equal(optimizer["state"][number][key], value) for key, value in state.items())


@pytest.fixture
def io() -> AtomicCheckpointIO:
    return AtomicCheckpointIO()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_was_saved_is_what_is_loaded(io, tmp_path, kind):
    saved, path = checkpoint(2.0), tmp_path / "new folder" / "a.ckpt"
    save_folder(saved, path) if kind == "folder" else io.save_checkpoint(saved, path)
    assert path.is_dir() == (kind == "folder")
    assert_same(io.load_checkpoint(path, weights_only=True), saved)
    assert [file.name for file in path.parent.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("before", ["file", "folder"])
@pytest.mark.parametrize("after", ["file", "folder"])
def test_one_kind_replaces_the_other(io, tmp_path, before, after):
    path, new = tmp_path / "last.ckpt", checkpoint(5.0)
    for kind, content in ((before, checkpoint(3.0)), (after, new)):
        save_folder(content, path) if kind == "folder" else io.save_checkpoint(content, path)
    assert_same(io.load_checkpoint(path), new)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(("before", "after"), [("file", "folder"), ("folder", "file"), ("folder", "folder")])
def test_a_death_between_two_renames_loses_nothing(io, tmp_path, monkeypatch, before, after):
    old, path, saves = checkpoint(1.0), tmp_path / "last.ckpt", {"file": io.save_checkpoint, "folder": save_folder}
    saves[before](old, path)
    rename = Path.rename

    def dies(self, target):
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            saves[after](checkpoint(2.0), path)
    assert not path.exists()
    recover(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert_same(io.load_checkpoint(path), old)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_write_that_fails_leaves_the_old_one(io, tmp_path, monkeypatch, kind):
    old, path = checkpoint(1.0), tmp_path / "last.ckpt"
    save = save_folder if kind == "folder" else io.save_checkpoint
    save(old, path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.torch, "save", _half)
        with pytest.raises((OSError, CheckpointException), match="no space left"):
            save(checkpoint(2.0), path)
    assert_same(io.load_checkpoint(path), old)
    recover(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def _half(checkpoint, file) -> None:
    with file.open("wb") if isinstance(file, Path) else file as out:
        out.write(b"PK half of it")
    raise OSError("no space left")


def test_half_written_checkpoints_are_not_the_last_ones(io, tmp_path):
    """Neither for Lightning's `--ckpt_path last` nor for its `hpc_ckpt_N.ckpt`."""
    callback = ModelCheckpoint(tmp_path, save_last=True)
    (tmp_path / ".last.ckpt.partial").write_bytes(b"half")
    (tmp_path / ".last.ckpt.old").mkdir()
    trainer = L.Trainer(callbacks=[callback], logger=False, accelerator="cpu")
    assert callback._find_last_checkpoints(trainer) == set()
    io.save_checkpoint(checkpoint(1.0), tmp_path / "last.ckpt")
    assert callback._find_last_checkpoints(trainer) == {str(tmp_path / "last.ckpt")}


def test_a_folder_comes_back_to_its_name(tmp_path):
    """A process died between the two renames."""
    saved = checkpoint(4.0)
    save_folder(saved, tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt").rename(tmp_path / ".last.ckpt.old")
    (tmp_path / ".last.ckpt.partial").mkdir()
    recover(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert_same(load_folder(tmp_path / "last.ckpt"), saved)


def test_an_old_folder_does_not_replace_the_new_one(tmp_path):
    new = checkpoint(5.0)
    save_folder(new, tmp_path / "last.ckpt")
    save_folder(checkpoint(4.0), tmp_path / ".last.ckpt.old")
    recover(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert_same(load_folder(tmp_path / "last.ckpt"), new)


def test_recovering_where_there_is_nothing_does_nothing(tmp_path):
    recover(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_checkpoint_is_named(io, tmp_path):
    with pytest.raises(ValueError, match=r"is not a checkpoint: it is a folder without a `meta.pt`"):
        io.load_checkpoint(tmp_path)


def test_sigkill_while_a_large_file_is_written(tmp_path):
    """For real: another process writes and writes; it is killed, and what is there is whole."""
    script = textwrap.dedent(f"""
        import torch
        from lightning_rlhf.checkpointing import AtomicCheckpointIO
        io = AtomicCheckpointIO()
        for i in range(10**6):
            io.save_checkpoint({{"i": i, "weights": torch.full((1_000_000,), float(i))}}, "{tmp_path}/last.ckpt")
            print(i, flush=True)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(5):
            written = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
    found = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert found["i"] >= written == 4
    assert torch.equal(found["weights"], torch.full((1_000_000,), float(found["i"])))


def test_settling_leaves_checkpoints_of_weights_alone():
    weights = {"state_dict": {}}
    settle(weights)
    assert weights == {"state_dict": {}}
