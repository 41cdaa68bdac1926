"""The figures and the texts that a page begins with: what was before, what is after, how sure the change is."""

import math
from typing import NamedTuple

import numpy as np

from .run import Columns, Run, number
from .scorecard import Goal, Targets, bootstrap_interval, common_prompts, evaluate, paired_gain

_NAMES = {
    "reward": "Reward",
    "kl": "KL to the reference, nats",
    "length": "Response length, tokens",
    "ended": "Responses that end",
}
_LOGGED = {  # of runs without held-out responses
    "val/loss": "Held-out loss",
    "val/perplexity": "Held-out perplexity",
    "val/agreement": "Agreement with people",
    "val/accuracy": "Accuracy on held-out pairs",
    "val/margin": "Held-out margin",
    "val/calibration_error": "Calibration error",
    "val/kl_per_token": "KL to the reference per token, nats",
    "val/reward": "Held-out reward",
    "val/kl": "Held-out KL, nats",
    "val/win_rate": "Win rate against the reference",
    "rollout/reward": "Reward of the rollouts",
    "rollout/kl": "KL of the rollouts, nats",
    "train/loss": "Training loss",
}


class Figure(NamedTuple):
    """One key figure; `before` and `change` are empty where there is nothing to compare with."""

    name: str
    before: str
    after: str
    change: str = ""


class Sample(NamedTuple):
    """A held-out prompt with its response before and after; nothing before without a baseline."""

    prompt: str
    before: str | None
    after: str
    reward_before: str
    reward_after: str


class Texts(NamedTuple):
    """Some samples under a heading."""

    title: str
    samples: list[Sample]


def held_out(run: Run) -> tuple[Columns | None, Columns | None]:
    """The held-out samples before and after, of the prompts that both have."""
    return common_prompts(run.before, run.after) if run.after else (None, None)


def judged(run: Run, before: Columns | None, after: Columns | None) -> list[Goal]:
    """The goals that the run was given, judged; none without held-out samples."""
    known = {name: value for name, value in run.goals.items() if name in Targets._fields}
    if not known or after is None or not {"response", "reward", "kl"} <= set(after):
        return []
    return evaluate(before, after, Targets(**known))


def key_figures(run: Run, before: Columns | None, after: Columns | None) -> list[Figure]:
    """Held-out figures before and after with intervals, or what was logged first and last."""
    figures = [] if after is None else [_held_out_figure(name, before, after) for name in _columns(after)]
    if after is not None and (won := win_rate(run)):
        figures.append(Figure("Win rate against the reference", "", f"{won[0]:.1%}", f"{won[1]:.1%} to {won[2]:.1%}"))
    if not figures:
        for name, title in _LOGGED.items():
            ends = run.first_and_last(name)
            if ends is not None and len(figures) < 6:
                change = shown(ends[1] - ends[0], sign=True) if ends[0] != ends[1] else ""
                figures.append(Figure(title, shown(ends[0]) if change else "", shown(ends[1]), change))
    return figures + cost(run)


def cost(run: Run) -> list[Figure]:
    """Time, memory, speed, and how much was done."""
    memory = [row["memory/peak_gib"] for row in run.history if "memory/peak_gib" in row]
    memory = memory or [value for value in [run.provenance.get("peak_memory_gib")] if isinstance(value, int | float)]
    speed = [row["throughput/tokens_per_second"] for row in run.history if "throughput/tokens_per_second" in row]
    steps = [row["step"] for row in run.history if "step" in row]
    iterations = {row["epoch"] for row in run.history if "rollout/reward" in row and "epoch" in row}
    found = {
        "Time": duration(seconds) if (seconds := run_seconds(run)) is not None else None,
        "Peak memory": f"{max(memory):.2f} GiB" if memory else None,
        "Tokens per second": shown(float(np.median(speed))) if speed else None,
        "Iterations": str(len(iterations)) if iterations else None,
        "Optimizer steps": f"{max(steps) + 1:.0f}" if steps else None,
    }
    return [Figure(name, "", value) for name, value in found.items() if value is not None]


def run_seconds(run: Run) -> float | None:
    """The run's seconds: of run.json, with the sessions before a resume, else the sum of what iterations took."""
    sessions = [*run.provenance.get("sessions", []), run.provenance]
    seconds = [each.get("seconds") for each in sessions if isinstance(each, dict)]
    if all(isinstance(value, int | float) for value in seconds):
        return float(sum(seconds))
    names = ["time/iteration"] if "time/iteration" in run.names else ["time/rollout", "time/scoring", "time/update"]
    logged = [row[name] for row in run.history for name in names if name in row]
    return sum(logged) if logged else None


def win_rate(run: Run) -> tuple[float, float, float] | None:
    """Share of prompts whose response scores above the reference's, ties half, with its 95% bootstrap interval.

    As it was logged, or else from the last held-out rows.
    """
    logged = [run.first_and_last(name) for name in ("val/win_rate", "val/win_rate_low", "val/win_rate_high")]
    if all(logged):
        return tuple(ends[1] for ends in logged)
    if not {"reward", "reference_reward"} <= set(run.after or {}):
        return None
    new, old = np.asarray(run.after["reward"]), np.asarray(run.after["reference_reward"])
    finite = np.isfinite(new) & np.isfinite(old)
    wins = (new[finite] > old[finite]) + 0.5 * (new[finite] == old[finite])
    return (float(wins.mean()), *bootstrap_interval(wins)) if len(wins) else None


def chosen_texts(before: Columns | None, after: Columns | None, count: int = 3) -> list[Texts]:
    """The best, the worst and the most changed held-out samples."""
    if after is None or "reward" not in after:
        return []
    rewards = np.asarray(after["reward"], dtype=float)
    finite = [i for i in np.argsort(-rewards, kind="stable").tolist() if math.isfinite(rewards[i])]
    picks = {"Best": finite[:count], "Worst": finite[::-1][:count]}
    if before is not None:
        change = rewards - np.asarray(before["reward"], dtype=float)
        order = [i for i in np.argsort(-change, kind="stable").tolist() if math.isfinite(change[i])]
        picks |= {
            "Risen most": [i for i in order if change[i] > 0][:count],
            "Fallen most": [i for i in order[::-1] if change[i] < 0][:count],
        }
    return [Texts(title, [_sample(before, after, i) for i in rows]) for title, rows in picks.items() if rows]


def rollout_texts(run: Run, count: int = 4) -> list[Texts]:
    """Without held-out samples: the first rows of the first and of the last kept rollout."""
    rows = [row for row in run.samples if {"iteration", "prompt", "response"} <= set(row)]
    if not rows:
        return []
    found = []
    for iteration in dict.fromkeys((rows[0]["iteration"], rows[-1]["iteration"])):
        some = [row for row in rows if row["iteration"] == iteration][:count]
        samples = [Sample(r["prompt"], None, r["response"], "", shown(number(r.get("reward")))) for r in some]
        found.append(Texts(f"Rollouts of iteration {iteration}", samples))
    return found


def shown(value: float | None, sign: bool = False) -> str:
    """A number for people: three digits and a real minus sign."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value).replace("nan", "NaN").replace("inf", "∞").replace("-", "−")
    style = ",.0f" if abs(value) >= 1000 else ".3f" if 0.001 <= abs(value) < 1 else ".3g"
    return format(value, "+" + style if sign else style).replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds for people: "42 s", "3 min 05 s", "2 h 07 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _columns(after: Columns) -> list[str]:
    """Numeric columns in the order shown; a component that is the reward itself is not shown twice."""
    parts = [name for name in after if name.startswith("reward/") and after[name] != after.get("reward")]
    return [name for name in ("reward", *parts, "kl", "length", "ended") if name in after]


def _held_out_figure(name: str, before: Columns | None, after: Columns) -> Figure:
    title = _NAMES.get(name, name.removeprefix("reward/"))
    level, change = (_percent, _points) if name == "ended" else (shown, _signed)
    if before is None or name not in before:
        finite = [value for value in after[name] if math.isfinite(value)]
        return Figure(title, "", level(sum(finite) / len(finite)) if finite else "NaN")
    gain = paired_gain(before[name], after[name])
    low, high = map(change, gain.interval)
    unit = " points" if name == "ended" else ""
    return Figure(title, level(gain.before), level(gain.after), f"{change(gain.difference)} ({low} to {high}){unit}")


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _points(share: float) -> str:
    return f"{100 * share:+.0f}".replace("-", "−")


def _signed(value: float) -> str:
    return shown(value, sign=True)


def _sample(before: Columns | None, after: Columns, i: int) -> Sample:
    old = None if before is None else before["response"][i]
    reward = "" if before is None else shown(before["reward"][i])
    return Sample(after["prompt"][i], old, after["response"][i], reward, shown(after["reward"][i]))
