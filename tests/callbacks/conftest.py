"""A module that behaves towards callbacks as the on-policy modules do, without learning anything of use."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

PROMPTS = ["The film", "An actor", "One | two", "Lines"]


class FakePPO(L.LightningModule):
    """Draws from all generators while it "rolls out", logs the documented names, remembers what it drew."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        self.trace, self.exported = [], []

    def on_train_epoch_start(self):
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        self.trace.append(drawn)
        self.samples = self.columns(self.current_epoch)
        self.log_dict({"rollout/reward": self.current_epoch + 0.5, "rollout/kl": self.current_epoch * 2.0})

    def columns(self, level):
        n = len(PROMPTS)
        return {
            "prompt": list(PROMPTS),
            "response": [f"text {i}, level\n{level}" for i in range(n)],
            "reward": [float(level + i) for i in range(n)],
            "kl": [0.5 * level] * n,
            "length": [3] * n,
            "ended": [True] * n,
            "reward/vader": [0.1 * level] * n,
        }

    def training_step(self, batch, batch_idx):
        self.trace.append(batch[0].flatten().tolist())
        loss = self.linear(torch.nn.functional.dropout(batch[0])).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log("policy/clip_fraction", 0.25)
        return loss

    def validation_step(self, batch, batch_idx):
        level = self.global_step  # 0 in the sanity check
        columns = self.columns(level)
        rows = batch[0].tolist()
        columns = {name: [column[i] for i in rows] for name, column in columns.items()}
        self.log("val/reward", sum(columns["reward"]) / len(rows), batch_size=len(rows))
        return columns

    def test_step(self, batch, batch_idx):
        self.log("test/agreement", 0.8)

    def predict_step(self, batch, batch_idx):
        return {
            "prompt": [PROMPTS[i] for i in batch[0].tolist()],
            "reward": batch[0].float(),
            "score": [float("nan")] * 2,
        }

    def save_pretrained(self, folder):
        self.exported.append(str(folder))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train_loader():
    return DataLoader(TensorDataset(torch.arange(8.0).view(4, 2)), batch_size=2, shuffle=True)


def held_out_loader():
    return DataLoader(TensorDataset(torch.arange(4)), batch_size=2)


@pytest.fixture
def fit(tmp_path):
    """Runs `fit` of a fresh FakePPO in `tmp_path`; returns the module and the trainer."""

    def run(callbacks, max_epochs=2, ckpt_path=None, module=None, **options):
        L.seed_everything(1, verbose=False)
        settings = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "num_sanity_val_steps": -1,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        trainer = L.Trainer(max_epochs=max_epochs, callbacks=callbacks, **settings | options)
        module = module or FakePPO()
        trainer.fit(module, train_loader(), held_out_loader(), ckpt_path=ckpt_path, weights_only=True)
        return module, trainer

    return run


# Advice from Lightning that these tests mean to ignore: loader workers, and resuming without the ModelCheckpoint.
_ADVICE = ("ignore:.*does not have many workers", "ignore:Be aware that when using `ckpt_path`")


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/callbacks" in item.path.as_posix():
            for advice in _ADVICE:
                item.add_marker(pytest.mark.filterwarnings(advice))
