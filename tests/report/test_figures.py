import math
from pathlib import Path

import pytest

from lightning_rlhf.report.figures import (
    Figure,
    chosen_texts,
    duration,
    held_out,
    judged,
    key_figures,
    rollout_texts,
    run_seconds,
    shown,
    win_rate,
)
from lightning_rlhf.report.run import Run, read_run


def rows(rewards, **columns):
    count = len(rewards)
    texts = {name: [f"{name} {i}" for i in range(count)] for name in ("prompt", "response")}
    return texts | {"reward": rewards} | columns


def run_with(before=None, after=None, **fields):
    found = {0: before, 5: after}
    return Run(Path("run"), evaluations={n: part for n, part in found.items() if part}, **fields)


def test_figures_before_and_after(folder):
    run = read_run(folder)
    figures = {figure.name: figure for figure in key_figures(run, *held_out(run))}
    assert figures["Reward"][1:3] == ("2", "4")  # means of 0, 2, 4 and of 1, 4, 7
    assert figures["Reward"].change.startswith("+2 (+1")
    assert figures["KL to the reference, nats"] == Figure("KL to the reference, nats", "0", "3", "+3 (+3 to +3)")
    assert figures["Response length, tokens"].after == "6"
    assert figures["Responses that end"][1:] == ("100%", "100%", "+0 (+0 to +0) points")
    assert figures["Time"].after == "2 min 05 s"
    assert (figures["Iterations"].after, figures["Optimizer steps"].after) == ("3", "6")
    assert figures["Tokens per second"].after == "100"


def test_component_that_is_the_reward_is_not_shown_twice():
    after = rows([1.0, 2.0], **{"reward/model": [1.0, 2.0], "reward/gold": [0.5, 0.25]})
    names = [figure.name for figure in key_figures(run_with(after=after), None, after)]
    assert names == ["Reward", "gold"]


def test_figures_without_held_out_rows_are_first_and_last():
    run = Run(
        Path("run"), history=[{"step": 0.0, "val/loss": 2.0}, {"step": 1.0, "val/loss": 1.5, "val/agreement": 0.8}]
    )
    loss, agreement, *_ = key_figures(run, None, None)
    assert loss == Figure("Held-out loss", "2", "1.5", "−0.500")
    assert agreement == Figure("Agreement with people", "", "0.800", "")


def test_nan_is_shown_and_left_out_of_means():
    after = rows([1.0, math.nan, 3.0])
    assert key_figures(run_with(after=after), None, after)[0].after == "2"
    nothing = rows([math.nan])
    assert key_figures(run_with(after=nothing), None, nothing)[0].after == "NaN"


def test_win_rate_counts_ties_half():
    # A win, a tie, a loss, a win, and one that is not known: (1 + 0.5 + 0 + 1) / 4.
    after = rows([2.0, 1.0, 0.0, 3.0, math.nan], reference_reward=[1.0, 1.0, 1.0, 1.0, 1.0])
    rate, low, high = win_rate(run_with(after=after))
    assert rate == 0.625
    assert 0 <= low < rate < high <= 1
    assert win_rate(run_with(after=rows([1.0]))) is None


def test_win_rate_is_the_logged_one():
    logged = {"step": 0.0, "val/win_rate": 0.6, "val/win_rate_low": 0.5, "val/win_rate_high": 0.7}
    after = rows([1.0], reference_reward=[2.0])
    assert win_rate(run_with(after=after, history=[logged])) == (0.6, 0.5, 0.7)


def test_seconds_of_all_sessions():
    record = {"seconds": 10.0, "sessions": [{"seconds": 5.0}, {"seconds": 2.5}]}
    assert run_seconds(Run(Path("run"), provenance=record)) == 17.5
    # A session that was killed has no seconds: then what was logged.
    history = [{"time/rollout": 3.0, "time/update": 1.0}, {"time/rollout": 2.0}]
    killed = {"seconds": 10.0, "sessions": [{"status": "killed"}]}
    assert run_seconds(Run(Path("run"), provenance=killed, history=history)) == 6.0
    assert run_seconds(Run(Path("run"))) is None


def test_best_worst_and_most_changed():
    before, after = rows([0.0, 5.0, 1.0, 1.0]), rows([3.0, 1.0, 2.0, 1.0])
    texts = {part.title: [sample.prompt for sample in part.samples] for part in chosen_texts(before, after, 2)}
    assert texts == {
        "Best": ["prompt 0", "prompt 2"],
        "Worst": ["prompt 3", "prompt 1"],
        "Risen most": ["prompt 0", "prompt 2"],  # by 3 and by 1
        "Fallen most": ["prompt 1"],  # by 4; prompt 3 has not changed
    }


def test_samples_without_baseline_and_without_any():
    (best, worst) = chosen_texts(None, rows([1.0, math.nan]), 1)
    assert best.samples == worst.samples
    assert best.samples[0][:4] == ("prompt 0", None, "response 0", "")
    assert chosen_texts(None, None) == []


def test_rollouts_stand_in_for_held_out_samples():
    samples = [{"iteration": str(n), "prompt": f"p{n}", "response": "r", "reward": "0.5"} for n in (0, 0, 4, 9)]
    first, last = rollout_texts(Run(Path("run"), samples=samples), count=1)
    assert (first.title, last.title) == ("Rollouts of iteration 0", "Rollouts of iteration 9")
    assert last.samples[0].prompt == "p9"
    assert len(first.samples) == 1


def test_goals_come_from_the_folder():
    run = run_with(rows([0.0]), rows([9.0], kl=[1.0]), goals={"max_kl": 2.0, "unknown": 1})
    assert [goal.met for goal in judged(run, *held_out(run))] == [True]
    assert judged(run, None, None) == []
    assert judged(run_with(after=rows([1.0], kl=[1.0])), None, rows([1.0], kl=[1.0])) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "NaN"),
        (-math.inf, "−∞"),
        (1234.5, "1,234"),
        (-0.0703, "−0.070"),
        (3.14159, "3.14"),
        (6.67e-6, "6.67e−06"),
        (0.0, "0"),
    ],
)
def test_shown(value, text):
    assert shown(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42 s"), (185, "3 min 05 s"), (7630, "2 h 07 min")])
def test_duration(seconds, text):
    assert duration(seconds) == text
