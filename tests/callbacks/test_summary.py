import json

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_rlhf.callbacks import HuggingFaceExport, StageSummary
from lightning_rlhf.callbacks.summary import choose


def test_table_and_json_after_fit(fit, tmp_path, capsys):
    fit([StageSummary(), HuggingFaceExport()], logger=CSVLogger(tmp_path, name="", version=""))
    printed = capsys.readouterr().out
    assert "FakePPO: fit" in printed
    # Two epochs of two steps: the last validation sees step 4, rewards 4..7.
    assert "val/reward" in printed
    assert "5.5" in printed
    assert "peak memory" in printed
    assert "GiB" in printed
    assert str(tmp_path / "metrics.csv") in printed
    metrics = json.loads((tmp_path / "summary.json").read_text())
    assert metrics["val/reward"] == 5.5
    assert metrics["rollout/kl"] == 2.0


def test_test_adds_to_fit(fit, tmp_path):
    module, trainer = fit([StageSummary()])
    trainer.test(module, DataLoader(TensorDataset(torch.arange(2))), verbose=False)
    metrics = json.loads((tmp_path / "summary.json").read_text())
    assert metrics["val/reward"] == 5.5
    assert round(metrics["test/agreement"], 6) == 0.8


def test_choice_of_metrics():
    metrics = {f"val/{i}": float(i) for i in range(20)} | {"train/loss": 0.123456, "other": 1.0}
    assert len(choose(metrics, None)) == 14
    assert choose({"policy/kl": 1.0, "train/loss": 0.123456}, None) == [("train/loss", "0.1235")]
    assert choose(metrics, ["other", "absent"]) == [("other", "1")]


def test_quiet_beyond_rank_zero(fit, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda self: False))
    fit([StageSummary()], max_epochs=1)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "summary.json").exists()
