"""Judges held-out samples from before and after PPO. Pure functions: no trainer, no files."""

import math
from typing import NamedTuple

import numpy as np

from ._shared import Columns


class Targets(NamedTuple):
    """What a run has to reach; `PPOReport` describes each."""

    min_reward_gain: float = 1.5
    gold: str | None = None
    min_gold_gain: float = 0.3
    max_kl: float = 15.0
    min_unique: float = 0.9
    min_distinct_share: float = 0.8
    min_agreement: float = 0.79


class Goal(NamedTuple):
    """One row of the report's first table, and whether it is met; None when it cannot be judged."""

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


def evaluate(
    before: Columns | None,
    after: Columns,
    targets: Targets,
    reward_model: dict[str, float] | None = None,
) -> list[Goal]:
    """Judge every goal. Without `before`, goals that compare with it stay unjudged.

    Args:
        before: columns "response", "reward", "kl" and reward components of the held-out prompts before training.
        after: the same after training, of the same prompts in the same order.
        targets: what to reach.
        reward_model: final metrics of the reward model's stage; its agreement becomes a goal.
    """
    goals = [_reward_goal(before, after, targets)]
    if targets.gold is not None:
        goals.append(_gold_goal(before, after, targets))
    goals += [_kl_goal(before, after, targets), _unique_goal(before, after, targets)]
    goals.append(_distinct_goal(before, after, targets))
    if reward_model is not None:
        goals.append(_agreement_goal(reward_model, targets))
    return goals


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
    """Mean of the paired differences, plain and in standard deviations (n - 1) of `before`."""
    old, new = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    difference = float(np.mean(new - old))
    spread = float(np.std(old, ddof=1)) if len(old) > 1 else 0.0
    in_stds = difference / spread if spread > 0 else math.copysign(math.inf, difference) if difference else 0.0
    return Gain(float(old.mean()), float(new.mean()), difference, in_stds, bootstrap_interval(new - old))


def bootstrap_interval(differences: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean, from a generator of its own: the run's random numbers are not touched."""
    picks = np.random.default_rng(seed).integers(0, len(differences), (resamples, len(differences)))
    low, high = np.quantile(differences[picks].mean(axis=1), [0.025, 0.975])
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
    return f"All {len(goals)} goals hold."


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
    name, goal = f"gold score `{targets.gold}`", f"rises by ≥ {targets.min_gold_gain:g}"
    if targets.gold not in after:
        return Goal(name, "–", "column absent", "–", goal, None)
    if before is None:
        return Goal(name, "–", f"{np.mean(after[targets.gold]):.3f}", "–", goal, None)
    gain = paired_gain(before[targets.gold], after[targets.gold])
    change = f"{gain.difference:+.3f} (95% interval {gain.interval[0]:+.3f} to {gain.interval[1]:+.3f})"
    met = gain.difference >= targets.min_gold_gain
    return Goal(name, f"{gain.before:.3f}", f"{gain.after:.3f}", change, goal, met)


def _kl_goal(before: Columns | None, after: Columns, targets: Targets) -> Goal:
    old, new = float(np.mean(before["kl"])) if before else None, float(np.mean(after["kl"]))
    row = _plain_row(old, new, ".2f")
    return Goal("mean sequence KL (nats)", *row, f"< {targets.max_kl:g}", new < targets.max_kl)


def _unique_goal(before: Columns | None, after: Columns, targets: Targets) -> Goal:
    from ..functional import unique_share

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


def _agreement_goal(reward_model: dict[str, float], targets: Targets) -> Goal:
    split = next((split for split in ("test", "val") if reward_model.get(f"{split}/agreement") is not None), None)
    name, goal = "reward model's agreement", f"≥ {targets.min_agreement:g}"
    if split is None:
        return Goal(name, "–", "not known", "–", goal, None)
    value = reward_model[f"{split}/agreement"]
    return Goal(name, "–", f"{value:.3f} ({split})", "–", goal, value >= targets.min_agreement)


def _plain_row(old: float | None, new: float, style: str) -> tuple[str, str, str]:
    if old is None:
        return "–", format(new, style), "–"
    return format(old, style), format(new, style), format(new - old, "+" + style)
