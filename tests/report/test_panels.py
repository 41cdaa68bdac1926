from pathlib import Path

import pytest

from lightning_rlhf.report import panels
from lightning_rlhf.report.run import Run, read_run


def run_with(*rows, **fields):
    return Run(
        Path("run"), history=[{"epoch": float(i), "step": float(i)} | row for i, row in enumerate(rows)], **fields
    )


def titles(charts):
    return [chart.title for chart in charts]


def test_charts_of_an_on_policy_run(folder):
    run = read_run(folder)
    assert titles(panels.curve_charts(run)) == ["Reward", "Reward: gold", "KL to the reference", "Gradient norm"]
    assert titles(panels.time_charts(run)) == ["Time", "Throughput"]
    assert panels.frontier_chart(run).title == "Reward against KL"
    assert titles(panels.distribution_charts(run.before, run.after)) == ["Rewards", "Lengths"]


@pytest.mark.parametrize(
    ("metric", "title"),
    [
        ("train/loss", "Loss"),
        ("val/perplexity", "Perplexity"),
        ("val/agreement", "Agreement"),
        ("train/accuracy", "Accuracy"),
        ("train/margin", "Margin"),
        ("train/reward_chosen", "Implicit rewards"),
        ("train/logprob_desirable", "Log-probability of the completions"),
        ("value/explained_variance", "Explained variance"),
        ("policy/clip_fraction", "Clip fraction"),
        ("train/grad_norm", "Gradient norm"),
        ("lr-AdamW", "Learning rate"),
    ],
)
def test_every_kind_of_run_has_its_charts(metric, title):
    assert titles(panels.curve_charts(run_with({metric: 1.0}))) == [title]


def test_unknown_metrics_are_drawn_too_and_those_with_a_place_are_not():
    run = run_with(
        {"mine/figure": 1.0, "train/loss": 2.0, "time/rollout": 1.0, "lr-AdamW": 1.0, "val/win_rate_low": 0.1}
    )
    assert titles(panels.other_charts(run)) == ["mine/figure"]


def test_component_that_is_the_reward_has_no_chart_of_its_own():
    rows = {"rollout/reward": 1.0, "rollout/reward/model": 1.0, "rollout/reward/gold": 0.5, "val/reward": 2.0}
    assert titles(panels.component_panels(run_with(rows))) == ["Reward: gold"]


def test_held_out_means_begin_before_training(folder):
    # Lightning logs nothing of its sanity check; validation.csv has it: means of 0, 2, 4 and of 1, 4, 7.
    run = read_run(folder)
    assert panels.series(run, "val/reward") == ([0.0, 3.0], [2.0, 4.0])
    assert panels.series(run, "val/response_length") == ([0.0, 3.0], [6.0, 6.0])
    assert panels.series(run, "rollout/reward") == run.series("rollout/reward")
    assert panels.series(run_with({"val/loss": 3.0}), "val/loss") == ([1.0], [3.0])


def test_last_value_is_told_of_a_single_curve():
    (chart,) = panels.curve_charts(run_with({"value/loss": 2.0}, {"value/loss": 0.12345}))
    assert chart.note == "last 0.123"
    (both,) = panels.curve_charts(run_with({"train/loss": 2.0, "val/loss": 3.0}))
    assert both.note == ""


def test_time_by_phase_with_shares():
    # 3 s of rollouts, 1 s of updates and 5 s in all: 1 s is other.
    chart = panels.phase_chart(run_with({"time/rollout": 3.0, "time/update": 1.0, "time/iteration": 5.0}))
    for part in ("rollout, 60%", "update, 20%", "other, 20%"):
        assert part in chart.svg
    assert panels.phase_chart(run_with({"train/loss": 1.0})) is None


def test_calibration_error_is_the_weighted_distance():
    # 30 pairs 0.1 away and 10 pairs 0.3 away: (30 * 0.1 + 10 * 0.3) / 40.
    rows = [
        {"bin": 0.0, "count": 30.0, "probability": 0.2, "label": 0.3},
        {"bin": 1.0, "count": 10.0, "probability": 0.9, "label": 0.6},
        {"bin": 2.0, "count": 0.0, "probability": 0.5, "label": 0.0},
    ]
    chart = panels.reliability_chart(run_with(reliability=rows))
    assert chart.note == "expected calibration error 0.150, 40 held-out pairs"
    assert panels.reliability_chart(run_with()) is None


def test_frontier_leaves_out_what_is_not_finite():
    bad = {"rollout/reward": float("nan"), "rollout/kl": 1.0}
    assert panels.frontier_chart(run_with(bad)) is None
    assert panels.frontier_chart(run_with(bad, {"rollout/reward": 1.0, "rollout/kl": 1.0})) is not None


def test_distributions_without_finite_values():
    nan = {"reward": [float("nan")], "length": [3.0]}
    assert titles(panels.distribution_charts(None, nan)) == ["Lengths"]
    assert panels.distribution_charts(None, None) == []
