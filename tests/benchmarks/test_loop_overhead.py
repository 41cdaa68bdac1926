"""The share of Lightning's loop: work and the rest of it, on an iteration of known parts."""

import importlib
import sys
import time

import lightning as L
import loop_overhead
import pytest
import torch
from loop_overhead import Shares
from torch.utils.data import DataLoader

ADAM = importlib.import_module("torch.optim.adam")


class Sleeper(L.LightningModule):
    """Three batches of 20 ms of work and 10 ms of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        time.sleep(0.02)
        return self.weight.sum()

    def on_train_batch_end(self, *args: object) -> None:
        time.sleep(0.01)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def test_tells_work_from_the_rest():
    original, shares = ADAM.adam, Shares()
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[shares],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Sleeper(), DataLoader(torch.zeros(3, 1)))
    ADAM.adam = original
    assert len(shares.iterations) == 2
    for seconds, work in shares.iterations:
        assert work >= 3 * 0.02
        assert seconds - work >= 3 * 0.01


def test_the_command_prints_a_share(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["loop_overhead.py", "--tiny", "--iterations", "1", "--threads", "1"])
    original = ADAM.adam
    loop_overhead.main()
    assert ADAM.adam is original
    share = float(capsys.readouterr().out.rsplit("an iteration, ")[1].split("%")[0])
    assert 0 < share < 100


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """Lightning warns of few workers."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
