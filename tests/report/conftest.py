"""A run's folder made by hand."""

import json
from pathlib import Path

import pytest
from run_folders import HOSTILE, held_out_rows, rollout_rows, write_csv


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole on-policy run."""
    root = tmp_path / "ppo-1"
    write_csv(root / "metrics.csv", rollout_rows())
    # Differences 1, 2, 3: the mean reward rises from 2 to 4.
    write_csv(root / "validation.csv", held_out_rows(0, [0.0, 2.0, 4.0]) + held_out_rows(3, [1.0, 4.0, 7.0]))
    write_csv(root / "samples.csv", [{"iteration": 0, "prompt": "p", "response": HOSTILE, "reward": 1.0}])
    alarm = {"time": "noon", "iteration": 2, "step": 5, "alarm": "KLAlarm", "message": HOSTILE, "action": "warn"}
    (root / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    record = {"status": "finished", "command": "python train.py fit", "seconds": 125.0, "git": {"commit": "abc123"}}
    (root / "run.json").write_text(json.dumps(record))
    (root / "config.yaml").write_text("seed_everything: 1\nmodel:\n  class_path: PPOModule\n")
    (root / "summary.json").write_text(json.dumps({"rollout/reward": 2.0}))
    (root / "tokens").mkdir()
    for n in (10, 2):
        (root / "tokens" / f"iteration_{n}.html").write_text("<p>tokens</p>")
    return root
