import math

import numpy as np
import pytest

from lightning_rlhf.report.scorecard import (
    Targets,
    bootstrap_interval,
    common_prompts,
    evaluate,
    paired_gain,
    verdict,
)

ALL = Targets(1.5, "reward/vader", 0.3, 15.0, 0.9, 0.8, 0.79, 0.79)


def columns(rewards, responses=("a b", "c d", "e f"), kl=1.0, vader=0.0):
    n = len(rewards)
    return {
        "prompt": [f"p{i}" for i in range(n)],
        "response": list(responses)[:n],
        "reward": list(rewards),
        "kl": [kl] * n,
        "reward/vader": [vader] * n,
    }


def test_paired_gain():
    # Differences 1, 2, 3; before has mean 2 and sample variance (4 + 0 + 4) / 2 = 4.
    gain = paired_gain([0.0, 2.0, 4.0], [1.0, 4.0, 7.0])
    assert gain[:4] == (2.0, 4.0, 2.0, 1.0)
    assert 1.0 <= gain.interval[0] < 2.0 < gain.interval[1] <= 3.0


def test_gain_of_constant_rewards_is_judged_on_the_difference():
    assert paired_gain([1.0, 1.0], [2.0, 2.0]).in_stds == float("inf")
    assert paired_gain([1.0, 1.0], [1.0, 1.0]).in_stds == 0.0


def test_gain_leaves_out_pairs_that_are_not_finite():
    gain = paired_gain([0.0, math.nan, 2.0, 9.0], [1.0, 5.0, 3.0, math.inf])
    assert gain[:3] == (1.0, 2.0, 1.0)
    assert all(map(math.isnan, paired_gain([math.nan], [1.0])[:4]))


def test_bootstrap_repeats_and_leaves_global_generator_alone():
    before = np.random.get_state()[1].tolist()
    differences = np.arange(10.0)
    assert bootstrap_interval(differences) == bootstrap_interval(differences)
    assert np.random.get_state()[1].tolist() == before
    assert bootstrap_interval(np.full(5, 2.0)) == (2.0, 2.0)


def test_bootstrap_interval_is_that_of_a_normal_mean():
    # Mean of 400 draws of variance 1: standard error 0.05, so about ± 1.96 * 0.05.
    values = np.random.default_rng(1).standard_normal(400)
    values = (values - values.mean()) / values.std()
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(-0.098, abs=0.01)
    assert high == pytest.approx(0.098, abs=0.01)


def test_all_goals_hold():
    before, after = columns([0.0, 1.0, 2.0]), columns([1.5, 2.5, 3.5], kl=14.9, vader=0.3)
    goals = evaluate(before, after, ALL)
    assert [goal.met for goal in goals] == [True] * 6
    assert verdict(goals) == "All 6 goals hold."


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"min_reward_gain": 1.0}, "mean reward"),
        ({"gold": "reward/vader"}, "gold score reward/vader"),
        ({"max_kl": 1.0}, "mean sequence KL (nats)"),
        ({"min_unique": 0.5}, "share of different responses"),
        ({"min_distinct_share": 0.5}, "distinct-2"),
        ({"min_agreement": 0.5}, "reward model's agreement"),
    ],
)
def test_only_what_was_asked_for_is_judged(asked, name):
    goals = evaluate(columns([0.0, 1.0]), columns([1.0, 2.0]), Targets(**asked))
    assert [goal.name for goal in goals] == [name]


def test_nothing_asked_for():
    assert evaluate(None, columns([1.0]), Targets()) == []


def test_reward_goal_takes_the_smaller_reading():
    # Both readings: difference 2, before's standard deviation 2, so 1 standard deviation: below 1.5.
    (wide, *_) = evaluate(columns([0.0, 2.0, 4.0]), columns([2.0, 4.0, 6.0]), ALL)
    assert wide.met is False
    assert wide.change.startswith("+2.00 normaliser units (95% interval +2.00 to +2.00); +1.00 std")
    # Difference 1 of standard deviation 0.1: 10 standard deviations, but only 1 unit.
    (narrow, *_) = evaluate(columns([0.0, 0.1, 0.2]), columns([1.0, 1.1, 1.2]), ALL)
    assert narrow.met is False


@pytest.mark.parametrize(
    ("after", "missed"),
    [
        ({"kl": 15.0}, "mean sequence KL (nats)"),
        ({"vader": 0.29}, "gold score reward/vader"),
        # Two of three responses differ, and distinct-2 is 2/3 of its value.
        ({"responses": ("a b", "c d", "a b")}, "share of different responses, distinct-2"),
    ],
)
def test_each_goal_can_be_missed(after, missed):
    settings = {"vader": 0.3} | after
    goals = evaluate(columns([0.0, 1.0, 2.0]), columns([3.0, 4.0, 5.0], **settings), ALL)
    assert verdict(goals) == f"{missed.count(',') + 1} of 6 goals missed: {missed}."


def test_agreement():
    low, unknown = ALL._replace(agreement=0.78), ALL._replace(agreement=None)
    (*_, goal) = evaluate(None, columns([1.0]), low)
    assert (goal.after, goal.met) == ("0.780", False)
    (*_, goal) = evaluate(None, columns([1.0]), unknown)
    assert (goal.after, goal.met) == ("not known", None)


def test_without_baseline_only_absolute_goals_are_judged():
    goals = evaluate(None, columns([1.0, 2.0, 3.0]), ALL)
    assert [goal.met for goal in goals] == [None, None, True, True, None, True]
    assert verdict(goals) == "3 of 6 goals could not be judged: mean reward, gold score reward/vader, distinct-2."


def test_common_prompts():
    before, after = columns([0.0, 1.0]), columns([1.0, 2.0, 3.0])
    assert [len(part["reward"]) for part in common_prompts(before, after)] == [2, 2]
    before["prompt"][1] = "another"
    assert [len(part["reward"]) for part in common_prompts(before, after)] == [1, 1]
    before["prompt"][0] = "another"
    assert common_prompts(before, after) == (None, after)
