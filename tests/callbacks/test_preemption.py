"""SIGTERM at every kind of moment: what is saved, how the process ends, and that the run goes on as if nothing was."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_rlhf.callbacks import Preemption, RNGState
from lightning_rlhf.loaders import EvenBatches, ResumableLoader, Rows

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
ROOT = Path(__file__).parents[2]
EPOCHS, BATCHES, ACCUMULATE = 3, 6, 2


class Regression(L.LightningModule):
    """Needs its random state, its data order and its optimizer's state to go on exactly; remembers what it did."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.trace = []

    def on_train_epoch_start(self):
        self.trace.append(("epoch", self.current_epoch))

    def training_step(self, batch, batch_idx):
        self.trace.append(("batch", self.current_epoch, batch_idx, batch.flatten().tolist()))
        self.log("batches", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return (self.linear(torch.nn.functional.dropout(batch, 0.2)) - 2).square().mean()

    def validation_step(self, batch, batch_idx):
        self.trace.append(("validation", self.global_step))

    def on_train_epoch_end(self):
        self.trace.append(("epoch end", self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Kill(L.Callback):
    """Sends this process a signal from a hook, in one epoch and at one batch of it."""

    def __init__(self, hook, epoch=0, batch=None, signum=signal.SIGTERM):
        def send(trainer, pl_module, *arguments):
            here = arguments[-1] if hook == "on_train_batch_start" else batch
            if trainer.current_epoch == epoch and here == batch:
                os.kill(os.getpid(), signum)

        setattr(self, hook, send)


def fit(folder, *callbacks, resume=None, keepers=None, **options):
    """Returns module, trainer and exit code (None if the run came to its end)."""
    L.seed_everything(1, verbose=False)
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "accumulate_grad_batches": ACCUMULATE,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "default_root_dir": folder,
    }
    keepers = [ModelCheckpoint(folder, save_last=True)] if keepers is None else keepers
    trainer = L.Trainer(callbacks=[*callbacks, RNGState(), Preemption(), *keepers], **settings | options)
    batches = EvenBatches(2 * BATCHES, 2, num_replicas=1, rank=0, shuffle=True, seed=3)
    rows = Rows(torch.arange(2.0 * BATCHES).view(-1, 1))
    rows = ResumableLoader(rows, batches, collate_fn=torch.stack, generator=torch.Generator())
    held_out = DataLoader(TensorDataset(torch.zeros(1, 1)))
    module, code = Regression(), None
    try:
        trainer.fit(module, rows, held_out, ckpt_path=resume, weights_only=True)
    except SystemExit as stopped:
        code = stopped.code
    return module, trainer, code


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(autouse=True)
def _handlers():
    """What was there before a fit is there after it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


class TestTheRunGoesOn:
    @pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}, {"val_check_interval": 3}], ids=str)
    @pytest.mark.parametrize(
        ("place", "step"),
        [
            (("on_train_batch_start", 0, 0), 1),
            (("on_train_batch_start", 0, 1), 1),
            (("on_train_batch_start", 0, 2), 2),
            (("on_train_batch_start", 1, 3), 5),
            (("on_train_batch_start", 0, 5), 3),
            (("on_train_epoch_start", 1), 4),
            (("on_train_epoch_end", 0), 3),
        ],
        ids=str,
    )
    def test_as_if_it_had_not_been_interrupted(self, place, step, options, tmp_path):
        whole, _, code = fit(tmp_path / "whole", **options)
        assert code is None
        first, trainer, code = fit(tmp_path, Kill(*place), **options)
        assert code == 143
        assert trainer.interrupted
        assert load(tmp_path / "last.ckpt")["global_step"] == step
        second, trainer, code = fit(tmp_path, resume="last", **options)
        assert code is None
        assert trainer.global_step == whole.global_step == EPOCHS * BATCHES / ACCUMULATE
        assert first.trace + second.trace == whole.trace
        for name, value in whole.state_dict().items():
            assert torch.equal(value, second.state_dict()[name])

    def test_a_signal_during_validation_waits_for_its_end(self, tmp_path):
        module, _, code = fit(tmp_path, Kill("on_validation_batch_start"))
        assert code == 143
        assert module.trace[-2:] == [("validation", 3), ("epoch end", 0)]

    def test_a_signal_during_the_sanity_check_is_not_lost(self, tmp_path):
        _, _, code = fit(tmp_path, Kill("on_sanity_check_end"), num_sanity_val_steps=1)
        assert code == 143
        assert load(tmp_path / "last.ckpt")["global_step"] == 1

    @pytest.mark.parametrize("options", [{}, {"max_steps": 8, "max_epochs": -1}], ids=str)
    def test_in_the_last_step_it_comes_to_its_end(self, options, tmp_path):
        batch = 3 if options else 5
        _, trainer, code = fit(tmp_path, Kill("on_train_batch_start", EPOCHS - 1, batch), **options)
        assert code is None
        assert trainer.state.finished


class TestWhatIsSaved:
    def test_a_second_signal_does_not_stop_the_saving(self, tmp_path):
        _, _, code = fit(tmp_path, Kill("on_train_batch_start", batch=0), Kill("on_save_checkpoint"))
        assert code == 143
        assert load(tmp_path / "last.ckpt")["global_step"] == 1

    def test_nothing_else(self, tmp_path):
        keeper = ModelCheckpoint(tmp_path, save_on_exception=True)
        _, _, code = fit(tmp_path, Kill("on_train_batch_start", batch=0), keepers=[keeper])
        assert code == 143
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]

    def test_without_a_model_checkpoint_it_goes_to_the_runs_folder(self, tmp_path):
        options = {"keepers": [], "enable_checkpointing": False}
        _, _, code = fit(tmp_path, Kill("on_train_batch_start", batch=0), **options)
        assert code == 143
        assert load(tmp_path / "checkpoints/last.ckpt")["global_step"] == 1

    @pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
    def test_a_link_to_another_checkpoint_is_not_followed(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", "/dev/shm")  # from where Lightning cannot just rename
        keeper = ModelCheckpoint(tmp_path, save_last="link")
        _, _, code = fit(tmp_path, Kill("on_train_batch_start", 1, 0), keepers=[keeper])
        assert code == 143
        assert load(tmp_path / "epoch=0-step=3.ckpt")["global_step"] == 3
        assert load(tmp_path / "last.ckpt")["global_step"] == 4

    def test_an_earlier_runs_checkpoint_stays(self, tmp_path):
        fit(tmp_path, max_epochs=1)
        before = (tmp_path / "last.ckpt").read_bytes()
        fit(tmp_path, Kill("on_train_batch_start", batch=0))
        assert (tmp_path / "last.ckpt").read_bytes() == before
        os.utime(tmp_path / "last.ckpt", (0, 0))  # the newest is `last`; file times are coarse
        fit(tmp_path, resume="last")
        assert load(tmp_path / "last-v1.ckpt")["global_step"] == 9
        assert not (tmp_path / "last-v2.ckpt").exists()

    def test_the_epochs_figures_are_logged_before(self, tmp_path):
        logger = CSVLogger(tmp_path, name="", version="")
        _, _, code = fit(tmp_path, Kill("on_train_batch_start", batch=BATCHES - 1), logger=logger, log_every_n_steps=1)
        assert code == 143
        with (tmp_path / "metrics.csv").open() as file:
            assert [float(row["batches"]) for row in csv.DictReader(file)] == [BATCHES]


class TestSurroundings:
    def test_loggers_hear_that_the_run_failed(self, tmp_path, monkeypatch):
        heard = []
        monkeypatch.setattr(CSVLogger, "finalize", lambda self, status: heard.append(status))
        fit(tmp_path, Kill("on_train_batch_start", batch=0), logger=CSVLogger(tmp_path), log_every_n_steps=1)
        assert heard == ["failed"]

    def test_the_trainer_keeps_its_callbacks_and_its_default_checkpoint(self, tmp_path):
        for kill in ([], [Kill("on_train_batch_start", batch=0)]):
            _, trainer, _ = fit(tmp_path, *kill, keepers=[], max_epochs=1)
            assert [type(callback) for callback in trainer.checkpoint_callbacks] == [ModelCheckpoint]

    def test_outside_the_main_thread_nothing_is_caught(self, tmp_path):
        codes = []
        thread = threading.Thread(target=lambda: codes.append(fit(tmp_path, max_epochs=1)[2]))
        thread.start()
        thread.join()
        assert codes == [None]


@pytest.fixture
def command(tmp_path, monkeypatch, tiny_model):
    """A fit from the command line that takes long enough to be interrupted."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": text} for text in ("hello there", "good day", "how are you", "fine, thanks")]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = ["--model=SFTModule", f"--model.model={tiny_model}", "--model.lr_scheduler=constant"]
    data = ["--data=SFTDataModule", "--data.data=texts.jsonl", "--data.val_data=texts.jsonl", "--data.batch_size=1"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.default_root_dir=run"]
    return [sys.executable, str(ROOT / "train.py"), "fit", *module, *data, *quiet]


def interrupted(command, signum, *arguments, **environment):
    """Runs until the second epoch, sends the signal; returns exit code and all that was said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    said = []
    with subprocess.Popen([*command, "--trainer.max_epochs=1000", *arguments], **options) as process:
        timer = threading.Timer(150, process.kill)
        timer.start()
        for line in process.stdout:  # to the end of all ranks
            said.append(line)
            if line.startswith("epoch 0"):
                process.send_signal(signum)
        timer.cancel()
    return process.returncode, "".join(said)


def test_command_line(command):
    code, said = interrupted(command, signal.SIGTERM, "--trainer.devices=1")
    assert code == 143, said
    assert "Traceback" not in said
    assert "SIGTERM: stopped at step" in said
    assert f"--ckpt_path {Path('run/checkpoints/last.ckpt').absolute()}" in said
    assert load("run/checkpoints/last.ckpt")["global_step"] >= 4


def test_two_ranks(command):
    code, said = interrupted(command, signal.SIGTERM, "--trainer.strategy=ddp", "--trainer.devices=2")
    assert code == 143, said
    assert "Traceback" not in said
    checkpoint = load("run/checkpoints/last.ckpt")
    assert checkpoint["global_step"] >= 2
    assert len(checkpoint["callbacks"]["RNGState"]["ranks"]) == 2


def test_a_slurm_job_is_requeued_and_goes_on(command, tmp_path):
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    scontrol.chmod(0o755)
    ranks = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "ppo", "SLURM_NTASKS_PER_NODE": "1"} | ranks
    environment = job | {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    code, said = interrupted(command, signal.SIGUSR1, "--trainer.devices=1", **environment)
    assert code == 128 + signal.SIGUSR1, said
    assert (tmp_path / "called").read_text() == "requeue 4711\n"
    step = load("run/hpc_ckpt_1.ckpt")["global_step"]
    assert load("run/checkpoints/last.ckpt")["global_step"] == step
    epochs = step // 4 + 2
    again = subprocess.run(
        [*command, "--trainer.devices=1", f"--trainer.max_epochs={epochs}"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert "hpc_ckpt_1.ckpt" in again.stderr
    assert load("run/checkpoints/last.ckpt")["global_step"] == 4 * epochs
