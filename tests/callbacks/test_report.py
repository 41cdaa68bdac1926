import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlhf.callbacks import PPOReport
from lightning_rlhf.callbacks.rendering import escape, render
from lightning_rlhf.callbacks.report import merge_ranks


def read(tmp_path):
    return (tmp_path / "report.md").read_text()


def test_report_of_a_run(fit, tmp_path, capsys):
    (tmp_path / "reward.json").write_text(json.dumps({"test/agreement": 0.8}))
    reward_model = str(tmp_path / "reward.json")
    fit([PPOReport(gold="reward/vader", reward_model_metrics=reward_model, prompts_in_table=1)])
    text = read(tmp_path)
    # Before: rewards 0..3, mean 1.5, standard deviation sqrt(5/3) = 1.29. After 4 steps every reward is 4 higher.
    assert "**All 6 goals hold.**" in text
    assert "| mean reward | 1.50 | 5.50 | +4.00 normaliser units (95% interval +4.00 to +4.00); +3.10 std" in text
    assert "| gold score `reward/vader` | 0.000 | 0.400 | +0.400 (95%" in text
    assert "| mean sequence KL (nats) | 0.00 | 2.00 | +2.00 | < 15 | yes |" in text
    assert "| reward model's agreement | – | 0.800 (test) |" in text
    assert "| The film | text 0, level ⏎ 0 | text 0, level ⏎ 4 | 0.00 | 4.00 |" in text
    assert "| iterations | 2 |" in text
    assert "| held-out prompts | 4 |" in text
    assert f"All 6 goals hold. Report: {tmp_path / 'report.md'}" in capsys.readouterr().out


def test_plots_are_images(fit, tmp_path):
    from matplotlib.image import imread

    fit([PPOReport()])
    text = read(tmp_path)
    for name in ("training", "frontier", "rewards"):
        assert f"](plots/{name}.png)" in text
        image = imread(tmp_path / "plots" / f"{name}.png")
        assert image.shape[0] > 400
        assert image.std() > 0.01  # something is drawn


def test_missed_goals_stand_at_the_top(fit, tmp_path):
    fit([PPOReport(min_reward_gain=5.0, max_kl=1.0)])
    assert read(tmp_path).splitlines()[2] == "**2 of 4 goals missed: mean reward, mean sequence KL (nats).**"


def test_no_baseline_is_said_plainly(fit, tmp_path):
    fit([PPOReport()], num_sanity_val_steps=0)
    text = read(tmp_path)
    assert "**2 of 4 goals could not be judged: mean reward, distinct-2.**" in text
    assert "**There is no baseline.**" in text


def test_partial_baseline_is_said_plainly(fit, tmp_path):
    fit([PPOReport()], num_sanity_val_steps=1)
    text = read(tmp_path)
    assert "covers only 2 of the held-out prompts" in text
    assert "| mean reward | 0.50 | 4.50 |" in text


def test_no_validation_at_all(fit, tmp_path):
    fit([PPOReport()], limit_val_batches=0)
    assert "**There are no held-out samples.**" in read(tmp_path)


def test_resumed_run_reports_whole_run(fit, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fit([PPOReport(), keep], enable_checkpointing=True)
    assert torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"]["PPOReport"]["history"]
    report = PPOReport()
    fit([report], max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert [row["iteration"] for row in report.history] == [0, 1, 2]
    # Baseline of the first run (mean 1.5), though the resumed run's sanity check saw a trained model.
    assert "| mean reward | 1.50 | 7.50 |" in read(tmp_path)


def test_history_has_validation_only_where_it_ran(fit):
    report = PPOReport()
    fit([report], max_epochs=3, check_val_every_n_epoch=2)
    assert ["val/reward" in row for row in report.history] == [False, True, False]
    assert [row["rollout/reward"] for row in report.history] == [0.5, 1.5, 2.5]


def test_ranks_are_merged_in_data_order():
    rank_0, rank_1 = [{"prompt": "a"}, {"prompt": "c"}], [{"prompt": "b"}, {"prompt": "a"}]
    assert merge_ranks([rank_0, rank_1], 3) == [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    assert merge_ranks([rank_0, rank_0], None) == rank_0  # every rank saw everything


@pytest.mark.parametrize(
    ("text", "shown"), [("a | b", r"a \| b"), ("one\n\n two ", "one ⏎ two"), ("*x*", r"\*x\*"), ("<s>", r"\<s\>")]
)
def test_escape(text, shown):
    assert escape(text) == shown


def test_render_without_anything():
    text = render([], None, None, [], {"iterations": "0"}, 3)
    assert text.startswith("# PPO report\n\n**There are no held-out samples.**")
    assert "| iterations | 0 |" in text
