"""g = 1/M Σ g_m: two ranks, under DDP and FSDP2, end where one process does, for every module; resumed runs too."""

import json
import os
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from processes import ranks, run_together
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_rlhf.checkpointing import load_folder

sys.path.insert(0, str(Path(__file__).parent))
from trainings import RUNS, make_models, run

pytestmark = [pytest.mark.filterwarnings("ignore:.*does not have many workers")]
SCRIPT = Path(__file__).with_name("trainings.py")
# Ratings compare the texts of one rank's batch with each other: there two ranks are one with accumulation.
ALONE = {"ratings": dict(accumulate=2)}
TWO = {f"{name} {kind}": dict(name=name, strategy=kind) for name in RUNS for kind in ("ddp", "fsdp2")}
TWO["ppo in_step"] = dict(name="ppo", strategy="in_step")

# Optimizer steps, within the second epoch of three.
STOP = {"ppo": 6, "ppo_lora": 3, "grpo": 6, "rft": 6, "online_dpo": 6, "sft_lora": 5}
STOP |= {"preferences": 5, "dpo": 5, "kto": 5, "ordinal": 3}
WRITERS = ("ddp", "fsdp2", "folder")  # of checkpoints on two ranks; "auto" writes on one
ON_TWO = (("ddp", "auto"), ("fsdp2", "auto"), ("fsdp2", "folder"), ("ddp", "folder"), ("folder", "ddp"))


def stopped_at(folder: Path, name: str, writer: str) -> str:
    return str(folder / f"{name}-{writer}.ckpt")


def exported_to(folder: Path, name: str, writer: str) -> str:
    return str(folder / f"{name}-{writer}")


def prepare(folder: Path) -> None:
    """All that takes two ranks, in one pair of processes: they resume what one process saved, and save for one."""
    folder.mkdir(exist_ok=True)
    make_models(folder)
    for name in STOP:
        where = stopped_at(folder, name, "auto"), exported_to(folder, name, "auto")
        run(name, folder, save=(STOP[name], where[0]), export=where[1], **ALONE.get(name, {}))
    tasks = dict(TWO)
    for name in STOP:
        for writer in WRITERS:
            where = dict(save=(STOP[name], stopped_at(folder, name, writer)), export=exported_to(folder, name, writer))
            tasks[f"{name} saved by {writer}"] = dict(name=name, strategy=writer, **where)
        for reader, writer in ON_TWO:
            resume = stopped_at(folder, name, writer)
            tasks[f"{name} {writer} to {reader}"] = dict(name=name, strategy=reader, resume=resume)
    (folder / "tasks.json").write_text(json.dumps(tasks))
    commands, environments = zip(
        *ranks([sys.executable, str(SCRIPT), str(folder / "tasks.json"), str(folder / "two")]), strict=True
    )
    run_together(*commands, log_folder=folder / "logs", environments=environments)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it all is; where tests run in parallel, the first to come makes it for all."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    folder = (tmp_path_factory.getbasetemp().parent if parallel else tmp_path_factory.mktemp("two")) / "parity"
    with FileLock(f"{folder}.lock"):
        if not (folder / "two.1").exists():
            prepare(folder)
    return folder


@pytest.fixture(scope="session")
def two(folder: Path) -> list[dict]:
    """The results of both ranks, by task."""
    return [torch.load(folder / f"two.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="session")
def one(folder: Path):
    """The uninterrupted run in one process."""
    return cache(lambda name: run(name, folder, **ALONE.get(name, {})))


def assert_same(found: dict, expected: dict) -> None:
    """Parameters and metrics to float32 rounding."""
    for name, value in expected["parameters"].items():
        torch.testing.assert_close(found["parameters"][name], value, rtol=2e-5, atol=2e-6, msg=f"{name} differs")
    names = [name for name in expected["metrics"] if not name.startswith(("time/", "throughput/"))]
    if "val/pearson" in names:  # ratings: these are over the pairs within a batch
        ordinal = "val/level_calibration_error" in names
        of_pairs = ("train/agreement", "train/margin") if ordinal else ("val/loss",)
        names = [name for name in names if name not in (*of_pairs, "val/calibration_error")]
    assert "train/loss" in names
    for name in names:
        assert found["metrics"][name] == pytest.approx(expected["metrics"][name], rel=2e-4, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("task", TWO)
def test_two_ranks_end_where_one_process_does(task, two, one):
    expected = one(task.split()[0])
    for found in two:
        assert found[task]["metrics"].keys() == expected["metrics"].keys()
    assert_same(two[0][task], expected)


ON_POLICY = ("ppo", "grpo", "rft", "online_dpo")


@pytest.mark.parametrize("task", [task for task in TWO if task.startswith(ON_POLICY)])
def test_two_ranks_sample_what_one_process_does(task, two, one):
    first, second = (found[task]["samples"]["response"] for found in two)
    assert first + second == one(task.split()[0])["samples"]["response"]
    assert first != second


def test_dynamic_sampling_takes_more_than_one_round(one):
    """Or ranks would have nothing to share out."""
    metrics = one("grpo_dynamic")["metrics"]
    assert 1 < metrics["rollout/sampling_rounds"] <= 3
    assert 0 < metrics["rollout/groups_with_spread"] < 1


@pytest.mark.parametrize("task", [task for task in TWO if "ratings" not in task])
def test_under_fsdp2_the_first_rank_alone_reads_the_weights(task, two):
    first, second = (found[task]["read"] for found in two)
    assert first == (3 if "value_model" in task else 1)  # policy, value network, reward model
    assert second == (first if task.endswith("ddp") else 0)


@pytest.mark.parametrize("name", ["ppo", "ppo_lora", "grpo", "grpo_dynamic", "online_dpo", "sft", "preferences"])
def test_accumulation_ends_where_the_whole_batch_does(name, folder, one):
    assert_same(run(name, folder, accumulate=2), one(name))


@pytest.mark.parametrize("name", [*STOP, "grpo_dynamic"])
def test_runs_move_further_than_the_tolerance(name, folder, one):
    """Or two runs that do nothing would be the same."""
    start, end = run(name, folder, max_steps=0), one(name)
    moved = [(end["parameters"][key] - value).abs().max() for key, value in start["parameters"].items()]
    assert max(moved) > 1e-2


@pytest.mark.parametrize("name", STOP)
@pytest.mark.parametrize(("reader", "writer"), ON_TWO)
def test_two_ranks_resume(name, reader, writer, two, one):
    assert_same(two[0][f"{name} {writer} to {reader}"], one(name))


@pytest.mark.parametrize("name", STOP)
@pytest.mark.parametrize("writer", WRITERS)
def test_one_process_resumes_what_two_ranks_saved(name, writer, folder, one):
    with pytest.warns(UserWarning, match="random states of 2 ranks, this run has 1"):
        found = run(name, folder, resume=stopped_at(folder, name, writer), **ALONE.get(name, {}))
    assert_same(found, one(name))


@pytest.mark.parametrize("name", STOP)
@pytest.mark.parametrize("writer", ["auto", *WRITERS])
def test_checkpoints_hold_what_is_trained_and_nothing_else(name, writer, folder):
    path = Path(stopped_at(folder, name, writer))
    assert path.is_dir() == (writer == "folder")
    checkpoint = load_folder(path) if path.is_dir() else torch.load(path, weights_only=True)
    trained = dict.fromkeys(("grpo", "rft", "online_dpo", "dpo", "kto"), ("policy.",))
    trained |= {"ppo": ("policy.", "value."), "preferences": ("network.",)}
    trained = (trained | {"ordinal": ("network.", "objective.")}).get(name, ("lora_", "value."))
    assert all(any(part in key for part in trained) for key in checkpoint["state_dict"])
    plain = torch.load(stopped_at(folder, name, "auto"), weights_only=True)
    assert checkpoint["state_dict"].keys() == plain["state_dict"].keys()
    assert all(value.shape == plain["state_dict"][key].shape for key, value in checkpoint["state_dict"].items())


@pytest.mark.parametrize("name", STOP)
@pytest.mark.parametrize("writer", WRITERS)
def test_exports_of_two_ranks_are_those_of_one(name, writer, folder):
    kind = AutoModelForSequenceClassification if name in ("preferences", "ordinal") else AutoModelForCausalLM
    found, expected = (kind.from_pretrained(exported_to(folder, name, w)) for w in (writer, "auto"))
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    for key in ("reward_mean", "reward_std"):
        assert getattr(found.config, key, 0) == pytest.approx(getattr(expected.config, key, 0), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.parametrize("name", ["ppo", "ppo_lora", "sft", "preferences"])
def test_on_a_gpu_too_fsdp2_ends_where_one_process_does(name, precision, folder):
    options = dict(accelerator="gpu", precision=precision, deterministic=True)
    expected = run(name, folder, **options)
    assert expected["metrics"]["train/loss"] == expected["metrics"]["train/loss"]  # not NaN
    if precision != "16-mixed":
        assert_same(run(name, folder, strategy="fsdp2", **options), expected)
