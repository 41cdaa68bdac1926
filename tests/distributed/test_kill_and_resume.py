"""SIGKILL at any moment, then `--ckpt_path last`: the run ends as if nothing had happened, bit for bit."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

SCRIPT = Path(__file__).with_name("kills.py")
LABELS = {"ppo": ["rollout"], "sft": [], "reward": []}
MORE = ("update", "checkpoint", "again and again", "at random")
TRIALS = [(name, label) for name in LABELS for label in [*LABELS[name], *MORE]]


@pytest.fixture(scope="session")
def trials(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict]:
    """All trainings, killed and not, made once."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    folder = (tmp_path_factory.getbasetemp().parent if parallel else tmp_path_factory.mktemp("killed")) / "kills"
    with FileLock(f"{folder}.lock"):
        if not (folder / "trials.json").exists():
            folder.mkdir(exist_ok=True)
            environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
            done = subprocess.run(
                [sys.executable, str(SCRIPT), str(folder)],
                env=environment | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=500,
            )
            assert done.returncode == 0, done.stdout + done.stderr
    return {(trial["name"], trial["label"]): trial for trial in json.loads((folder / "trials.json").read_text())}


CLOCKS = ("time/", "throughput/", "memory/")  # what a run takes, not what it learns


def last_checkpoint(trial: dict) -> dict:
    return torch.load(Path(trial["root"]) / "checkpoints" / "last.ckpt", weights_only=True)


def metrics(trial: dict) -> dict[tuple[int, str], str]:
    """All that was logged, by step and name; what a later start logged again replaces the earlier."""
    root, found = Path(trial["root"]), {}
    earlier = sorted(root.glob("metrics_*.csv"), key=lambda path: int(path.stem.partition("_")[2]))
    for path in [*earlier, *root.glob("metrics.csv")]:  # none of a start that found nothing left to do
        with path.open() as file:
            for row in csv.DictReader(file):
                values = {name: value for name, value in row.items() if value and name not in ("step", "epoch")}
                found |= {(int(row["step"]), name): value for name, value in values.items()}
    return {key: value for key, value in found.items() if not key[1].startswith(CLOCKS)}


def assert_equal(found: object, expected: object, where: str) -> None:
    """The same to the last bit, in all branches."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_equal(found[i], value, f"{where}/{i}")
    else:
        assert found == expected, where


def test_the_uninterrupted_runs_learn(trials):
    for name in LABELS:
        trial = trials[name, "whole"]
        assert trial["finished"] == 0
        losses = [float(value) for (_, key), value in sorted(metrics(trial).items()) if key == "train/loss"]
        assert len(set(losses)) > 8


@pytest.mark.parametrize(("name", "label"), TRIALS)
def test_a_killed_run_ends_as_the_uninterrupted_one(name, label, trials):
    killed, whole = trials[name, label], trials[name, "whole"]
    assert killed["killed"]
    assert set(killed["killed"]) <= ({-9, 0} if label == "at random" else {-9})  # 0: it was done before that moment
    assert killed["finished"] == 0
    found, expected = last_checkpoint(killed), last_checkpoint(whole)
    state = ["state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"]
    state += ["on_policy", "PromptDataModule"] if name == "ppo" else ["place"]
    for key in state:
        assert_equal(found[key], expected[key], key)
    assert_equal(found["callbacks"]["RNGState"], expected["callbacks"]["RNGState"], "RNGState")


@pytest.mark.parametrize(("name", "label"), TRIALS)
def test_its_metrics_are_those_of_the_uninterrupted_one(name, label, trials):
    found, expected = metrics(trials[name, label]), metrics(trials[name, "whole"])
    assert found.keys() == expected.keys()
    assert {key: value for key, value in found.items() if value != expected[key]} == {}


@pytest.mark.parametrize("name", LABELS)
def test_a_write_that_was_cut_short_left_no_trace(name, trials):
    folder = Path(trials[name, "checkpoint"]["root"]) / "checkpoints"
    assert not list(folder.glob(".*"))
    for path in folder.glob("*.ckpt"):
        torch.load(path, weights_only=True)
