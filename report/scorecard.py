"""Judges held-out samples from before and after training. Pure functions: no trainer, no files."""

import math
from typing import NamedTuple

import numpy as np

from .run import Columns


class Targets(NamedTuple):
    """What a run has to reach; a goal without a number is not judged. The callback `RunReport` describes each."""

    min_reward_gain: float | None = None
    gold: str | None = None
    min_gold_gain: float = 0.3
    max_kl: float | None = None
    min_unique: float | None = None
    min_distinct_share: float | None = None
    min_agreement: float | None = None
    agreement: float | None = None


class Goal(NamedTuple):
    """One row of the table of goals, and whether it is met; None when it cannot be judged."""

    name: str
    before: str
    after: str
    change: str
    goal: str
    met: bool | None


class Gain(NamedTuple):
    """How much a paired mean rose."""

    before: float
    after: float
    difference: float
    in_stds: float  # difference / standard deviation of the samples before
    interval: tuple[float, float]  # bootstrap, 95%


def evaluate(before: Columns | None, after: Columns, targets: Targets) -> list[Goal]:
    """Judge every goal that has a number. Without `before`, goals that compare with it stay unjudged.

    Args:
        before: columns "response", "reward", "kl" and reward components of the held-out prompts before training.
        after: the same after training, of the same prompts in the same order.
        targets: what to reach.
    """
    judges = {
        _reward_goal: targets.min_reward_gain,
        _gold_goal: targets.gold,
        _kl_goal: targets.max_kl,
        _unique_goal: targets.min_unique,
        _distinct_goal: targets.min_distinct_share,
    }
    goals = [judge(before, after, targets) for judge, wanted in judges.items() if wanted is not None]
    return goals if targets.min_agreement is None else [*goals, _agreement_goal(targets)]


def common_prompts(before: Columns | None, after: Columns) -> tuple[Columns | None, Columns]:
    """Cut both to the prompts they share from the start on; None for `before` when that leaves nothing.

    They differ when the sanity check saw only some batches of the held-out prompts.
    """
    if before is None:
        return None, after
    shared = 0
    for old, new in zip(before["prompt"], after["prompt"], strict=False):
        if old != new:
            break
        shared += 1
    if shared == 0:
        return None, after
    cut = [{name: column[:shared] for name, column in columns.items()} for columns in (before, after)]
    return cut[0], cut[1]


def paired_gain(before: list[float], after: list[float]) -> Gain:
    """Mean of the paired differences, plain and in standard deviations (n - 1) of `before`.

    Pairs with a NaN or an infinity on either side are left out.
    """
    old, new = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    finite = np.isfinite(old) & np.isfinite(new)
    old, new = old[finite], new[finite]
    if not len(old):
        return Gain(math.nan, math.nan, math.nan, math.nan, (math.nan, math.nan))
    difference = float(np.mean(new - old))
    spread = float(np.std(old, ddof=1)) if len(old) > 1 else 0.0
    in_stds = difference / spread if spread > 0 else math.copysign(math.inf, difference) if difference else 0.0
    return Gain(float(old.mean()), float(new.mean()), difference, in_stds, bootstrap_interval(new - old))


def bootstrap_interval(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean, from a generator of its own: the run's random numbers are not touched."""
    picks = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def verdict(goals: list[Goal]) -> str:
    """The outcome in one sentence or two."""
    missed = [goal.name for goal in goals if goal.met is False]
    unjudged = [goal.name for goal in goals if goal.met is None]
    sentences = []
    if missed:
        sentences.append(f"{len(missed)} of {len(goals)} goals missed: {', '.join(missed)}.")
    if unjudged:
        sentences.append(f"{len(unjudged)} of {len(goals)} goals could not be judged: {', '.join(unjudged)}.")
    if sentences:
        return " ".join(sentences)
    if len(goals) == 1:
        return f"The goal holds: {goals[0].name}."
    return f"All {len(goals)} goals hold." if goals else "No goals could be judged: there are no held-out responses."


def _reward_goal(before: Columns | None, after: Columns, targets: Targets) -> Goal:
    name, goal = "mean reward", f"rises by ≥ {targets.min_reward_gain:g} standard deviations (the smaller reading)"
    if before is None:
        return Goal(name, "–", f"{np.mean(after['reward']):.2f}", "–", goal, None)
    gain = paired_gain(before["reward"], after["reward"])
    change = (
        f"{gain.difference:+.2f} normaliser units (95% interval {gain.interval[0]:+.2f} to {gain.interval[1]:+.2f}); "
        f"{gain.in_stds:+.2f} std of the samples before"
    )
    met = min(gain.difference, gain.in_stds) >= targets.min_reward_gain
    return Goal(name, f"{gain.before:.2f}", f"{gain.after:.2f}", change, goal, met)


def _gold_goal(before: Columns | None, after: Columns, targets: Targets) -> Goal:
    name, goal = f"gold score {targets.gold}", f"rises by ≥ {targets.min_gold_gain:g}"
    if targets.gold not in after:
        return Goal(name, "–", "column absent", "–", goal, None)
    if before is None or targets.gold not in before:
        return Goal(name, "–", f"{np.mean(after[targets.gold]):.3f}", "–", goal, None)
    gain = paired_gain(before[targets.gold], after[targets.gold])
    change = f"{gain.difference:+.3f} (95% interval {gain.interval[0]:+.3f} to {gain.interval[1]:+.3f})"
    met = gain.difference >= targets.min_gold_gain
    return Goal(name, f"{gain.before:.3f}", f"{gain.after:.3f}", change, goal, met)


def _kl_goal(before: Columns | None, after: Columns, targets: Targets) -> Goal:
    old, new = float(np.mean(before["kl"])) if before and "kl" in before else None, float(np.mean(after["kl"]))
    row = _plain_row(old, new, ".2f")
    return Goal("mean sequence KL (nats)", *row, f"< {targets.max_kl:g}", new < targets.max_kl)


def _unique_goal(before: Columns | None, after: Columns, targets: Targets) -> Goal:
    from ..functional import unique_share  # here: it brings torch along, which a report does without

    old, new = unique_share(before["response"]) if before else None, unique_share(after["response"])
    row = _plain_row(old, new, ".3f")
    return Goal("share of different responses", *row, f"≥ {targets.min_unique:g}", new >= targets.min_unique)


def _distinct_goal(before: Columns | None, after: Columns, targets: Targets) -> Goal:
    from ..functional import distinct_n

    name, goal = "distinct-2", f"keeps ≥ {targets.min_distinct_share:.0%} of its value before"
    new = distinct_n([text.split() for text in after["response"]], 2)
    if before is None:
        return Goal(name, "–", f"{new:.3f}", "–", goal, None)
    old = distinct_n([text.split() for text in before["response"]], 2)
    kept = new / old if old > 0 else 1.0  # nothing to lose
    return Goal(name, f"{old:.3f}", f"{new:.3f}", f"{kept:.0%} kept", goal, kept >= targets.min_distinct_share)


def _agreement_goal(targets: Targets) -> Goal:
    name, goal = "reward model's agreement", f"≥ {targets.min_agreement:g}"
    if targets.agreement is None:
        return Goal(name, "–", "not known", "–", goal, None)
    return Goal(name, "–", f"{targets.agreement:.3f}", "–", goal, targets.agreement >= targets.min_agreement)


def _plain_row(old: float | None, new: float, style: str) -> tuple[str, str, str]:
    if old is None:
        return "–", format(new, style), "–"
    return format(old, style), format(new, style), format(new - old, "+" + style)
