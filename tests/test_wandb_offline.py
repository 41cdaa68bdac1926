"""A real PPO run through the command line, offline; what W&B then holds of it."""

import csv
import json
import re
from pathlib import Path

import pytest
from offline_wandb import OfflineRun

from lightning_rlhf.train import main

pytestmark = [  # advice about runs as short as these
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]
DOCS = Path(__file__).parents[1] / "docs/metrics.md"
PROMPTS = ("hello", "good", "how are", "fine,")
SECTIONS = {"Sampled responses", "Updates on them", "Time, memory, progress"}
OF_OTHERS = {  # names in these sections that this run does not log: those of other methods, and of GPUs
    *("rollout/groups_with_spread", "rollout/sampling_rounds", "rollout/best_reward", "rollout/best_length"),
    *("rollout/pair_gap", "rollout/tied_pairs", "val/kl_bound", "throughput/mfu"),
}


def documented(sections: set[str]) -> set[str]:
    """Names in the first columns of the tables under some headings of docs/metrics.md; `_x` ends the name before it."""
    names = set()
    for part in re.split(r"^## ", DOCS.read_text(), flags=re.MULTILINE):
        heading, *lines = part.splitlines()
        if heading in sections:
            cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
            names |= {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    return {name for name in names if "/" in name and "..." not in name}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> OfflineRun:
    """Two iterations of PPO with two held-out evaluations and the one before."""
    folder = tmp_path_factory.mktemp("offline")
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["train.py"])
        for name, value in environment.items():
            patch.setenv(name, value)
        main([
            "fit", "--model=PPOModule", f"--model.model={tiny_model}", "--model.lr_scheduler=constant",
            "--model.reward=lightning_rlhf.rewards.vader_compound", "--model.rollout_batch_size=4",
            "--model.minibatch_size=2", "--model.num_passes=2", "--model.max_new_tokens=4",
            "--data=PromptDataModule", f"--data.data={data}", f"--data.val_data={data}", "--data.batch_size=2",
            "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_model_summary=false",
            "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--trainer.num_sanity_val_steps=-1",
            "--trainer.default_root_dir=run",
        ])  # fmt: skip
    return OfflineRun(folder / "run")


def test_documented_reads_the_page():
    assert len(documented(SECTIONS)) > 30
    assert {"rollout/reward", "policy/ratio_max", "time/rollout"} <= documented(SECTIONS)


def test_every_documented_name_is_there(run):
    expected = {name.replace("<name>", "vader_compound") for name in documented(SECTIONS)} - OF_OTHERS
    missing = expected - run.names()
    assert not missing
    assert expected <= run.summary.keys()


def test_names_are_drawn_over_their_axes(run):
    assert [x for x, _ in run.series("progress/iteration", "rollout/reward")] == [1, 2]
    assert [x for x, _ in run.series("progress/iteration", "val/reward")] == [1, 2]
    assert [x for x, _ in run.series("trainer/global_step", "policy/grad_norm")] == list(range(8))
    assert [x for x, _ in run.series("trainer/global_step", "policy/loss")] == [3, 7]
    assert len(run.series("frontier/kl", "frontier/reward")) == 2
    assert len(run.series("frontier/val_kl", "frontier/val_reward")) == 2


def test_summaries(run):
    rewards = [reward for _, reward in run.series("progress/iteration", "val/reward")]
    assert run.summary["val/reward"] == {"max": max(rewards)}
    assert run.summary["rollout/kl"] == run.series("progress/iteration", "rollout/kl")[-1][1]


def test_tables_have_the_rows_of_the_files(run):
    for key, name, count in (
        ("samples/rollouts", "samples.csv", 2 * 4),
        ("samples/validation", "validation.csv", 3 * 4),
    ):
        table = run.tables(key)[-1]
        with (run.folder.parents[1] / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(table["data"]) == len(rows) == count
        told = sorted((row["iteration"], row["response"]) for row in rows)
        place, response = table["columns"].index("iteration"), table["columns"].index("response")
        assert sorted((str(row[place]), row[response]) for row in table["data"]) == told


def test_token_view_is_there(run):
    (page,) = [row["tokens/view"] for row in run.history if "tokens/view" in row]
    assert page["_type"] == "html-file"
    text = (run.folder / "files" / page["path"]).read_text()
    assert text == (run.folder.parents[1] / "tokens/iteration_0.html").read_text()
    assert 'id="by-kl"' in text
    assert 'id="by-value"' in text
    assert 'id="by-advantage"' in text
