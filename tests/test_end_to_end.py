"""SFT, reward model, PPO through the command line, each stage reading what the stage before it exported."""

import html
import json
import math
from pathlib import Path

import pytest

from lightning_rlhf.train import main

pytestmark = [  # advice about runs as short as these
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all targets"),
]
WORDS = ("good", "fine", "bad", "poor")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the stages run, with ratings of short reviews: the same file serves all three."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    rows = [{"text": f"film {i} was {WORDS[i % 4]}", "ratings": [2 - i % 4, 1 - i % 4, 2 - i % 4]} for i in range(12)]
    Path("reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def fit(stage: str, *flags: str):
    common = [
        "--data.data=reviews.jsonl",
        "--data.val_data=reviews.jsonl",
        "--data.batch_size=4",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.logger=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
        f"--trainer.default_root_dir=runs/{stage}",
    ]
    return main(["fit", *flags, *common])


def summary(stage: str) -> dict[str, float]:
    return json.loads(Path(f"runs/{stage}/summary.json").read_text())


@pytest.mark.parametrize("lora", [[], ["--model.lora_r=4"]], ids=["all weights", "LoRA"])
def test_from_ratings_to_a_policy(lora, folder, tiny_model, capsys):
    rate = "--model.learning_rate=1e-2"
    fit(
        "sft",
        "--model=SFTModule",
        f"--model.model={tiny_model}",
        rate,
        *lora,
        "--data=SFTDataModule",
        "--trainer.max_epochs=2",
    )
    fit("reward", "--model=RewardModule", "--model.model=runs/sft/model", rate, *lora, "--data=RatingDataModule",
        "--trainer.max_epochs=4")  # fmt: skip
    ppo = fit(
        "ppo",
        "--model=PPOModule",
        "--model.model=runs/sft/model",
        "--model.reward=[runs/reward/model, lightning_rlhf.rewards.vader_compound]",
        "--model.reward_weights=[1, 0]",
        "--model.rollout_batch_size=8",
        "--model.minibatch_size=4",
        "--model.num_passes=2",
        "--model.max_new_tokens=6",
        *lora,
        "--data=PromptDataModule",
        "--data.opening_tokens=5",
        "--trainer.max_epochs=3",
        "--trainer.check_val_every_n_epoch=3",
        "--trainer.num_sanity_val_steps=-1",
        "--trainer.callbacks=RunReport",
        "--trainer.callbacks.min_reward_gain=1.5",
        "--trainer.callbacks.gold=reward/vader_compound",
        "--trainer.callbacks.reward_model_metrics=runs/reward/summary.json",
    )

    assert math.isfinite(summary("sft")["val/perplexity"])
    assert 0 <= summary("reward")["val/agreement"] <= 1
    assert ppo.trainer.global_step == 3 * 2 * 2  # iterations x passes x minibatches
    report = html.unescape(Path("runs/ppo/report.html").read_text())
    for expected in ("reward model's agreement", "gold score reward/vader_compound", "film"):
        assert expected in report
    assert "std of the samples before" in report  # the sanity check was taken as the baseline
    assert "runs/ppo/report.html" in capsys.readouterr().out

    # Scores of the normalised reward model on the texts that it was fitted on: mean 0, standard deviation 1.
    scored = main([
        "predict", "--model=RewardModule", "--model.model=runs/reward/model", "--data=RatingDataModule",
        "--data.data=reviews.jsonl", "--data.val_data=reviews.jsonl", "--data.batch_size=4",
        "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false",
        "--trainer.enable_model_summary=false", "--trainer.default_root_dir=runs/scores",
    ])  # fmt: skip
    lines = (Path(scored.trainer.default_root_dir) / "predictions.jsonl").read_text().splitlines()
    scores = [json.loads(line)["score"] for line in lines]
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-3)
