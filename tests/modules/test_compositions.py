"""Advantages, objectives and aggregations: against loops and by hand; on the command line and in YAML."""

import json
import math

import pytest
import slow
import torch
import yaml
from torch.testing import assert_close

from lightning_rlhf.functional.masking import identity
from lightning_rlhf.modules import compositions
from lightning_rlhf.modules.compositions import (
    FixedLengthMean,
    GroupCentered,
    GroupNormalized,
    LeaveOneOut,
    SequenceMean,
    SequenceRatio,
    TokenMean,
    TokenRatio,
    WhitenedGroupScores,
    WhitenedReturns,
)
from lightning_rlhf.train import main

ADVANTAGES = {cls.__name__: cls for cls in compositions.Advantage.__subclasses__()} | {
    "WhitenedGroupScores": WhitenedGroupScores
}
OBJECTIVES = [TokenRatio(), TokenRatio(0.1, 0.4), SequenceRatio(0.1, 0.2), SequenceRatio()]
AGGREGATIONS = {"TokenMean": TokenMean(), "SequenceMean": SequenceMean(), "FixedLengthMean": FixedLengthMean(7)}
LENGTHS = [4, 1, 3, 2, 4, 2]
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def numbers(seed, scale=1.0):
    """(6, 5) float64 with NaN outside the mask."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(MASK.shape, generator=generator, dtype=torch.float64)).masked_fill(~MASK, torch.nan)


def ragged(x):
    return [row[:n].tolist() for row, n in zip(x, LENGTHS, strict=True)]


def wide(rows):
    return slow.padded(rows, MASK.shape[1]).double()


def test_the_lists_here_are_whole():
    assert ADVANTAGES.keys() == slow.ADVANTAGES.keys()
    assert {type(objective) for objective in OBJECTIVES} == set(compositions.Objective.__subclasses__())
    assert {type(a) for a in AGGREGATIONS.values()} == set(compositions.Aggregation.__subclasses__())


# --- advantages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_equal_loops(name, size):
    rewards = numbers(1)
    found = ADVANTAGES[name]()(rewards, MASK, size, identity)
    expected = wide(slow.ADVANTAGES[name](ragged(rewards), size))
    assert expected.abs().max() > 0.5
    assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equal_rewards_give_no_advantage(name):
    """But for returns, which are compared over tokens: the only reward is at the last, so they are equal too."""
    last = torch.tensor(LENGTHS)[:, None] - 1 == torch.arange(5)
    assert_close(ADVANTAGES[name]()(3.0 * last, MASK, 3, identity), torch.zeros(MASK.shape))


@pytest.mark.parametrize("name", ["GroupNormalized", "GroupCentered", "LeaveOneOut"])
def test_relative_advantages_sum_to_zero_in_each_group_and_know_no_other(name):
    rewards = numbers(2)
    found = ADVANTAGES[name]()(rewards, MASK, 3, identity)
    assert_close(found[:, 0].view(2, 3).sum(1), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    other = rewards.clone()
    other[3:] *= 5
    again = ADVANTAGES[name]()(other, MASK, 3, identity)
    assert torch.equal(again[:3], found[:3])
    swapped = ADVANTAGES[name]()(rewards.roll(3, 0), MASK.roll(3, 0), 3, identity)
    assert torch.equal(swapped, found.roll(3, 0))


def test_golden():
    rewards, mask = torch.tensor([[0.0, 1.0], [3.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    assert GroupCentered()(rewards, mask, 2, identity).tolist() == [[-1, -1], [1, 0]]
    assert LeaveOneOut()(rewards, mask, 2, identity).tolist() == [[-2, -2], [2, 0]]
    # The deviation of 1 and 3, with n - 1 in the denominator, is √2.
    assert_close(
        GroupNormalized(0.5)(rewards, mask, 2, identity), torch.tensor([[-1.0, -1.0], [1.0, 0.0]]) / (2**0.5 + 0.5)
    )
    # Returns 1, 1 and 3; half a discount makes them 0.5, 1 and 3: mean 1.5, variance (1 + 0.25 + 2.25) / 3.
    assert_close(
        WhitenedReturns(0.5)(rewards, mask, 2, identity),
        torch.tensor([[-1.0, -0.5], [1.5, 0.0]]) / math.sqrt(3.5 / 3),
    )
    # -1, -1, 1: mean -1/3, variance (4/9 + 4/9 + 16/9) / 3 = 8/9.
    assert_close(
        WhitenedGroupScores()(rewards, mask, 2, identity),
        torch.tensor([[-2.0, -2.0], [4.0, 0.0]]) / 3 / math.sqrt(8 / 9),
    )


@pytest.mark.parametrize("name", ["WhitenedReturns", "WhitenedGroupScores"])
def test_whitening_is_over_all_ranks(name):
    """Each of two ranks, whose `reduce` adds what the other one hands in, gets its part of the whole."""
    rewards = numbers(3)
    whole = ADVANTAGES[name]()(rewards, MASK, 3, identity)
    alone = ADVANTAGES[name]()(rewards[:3], MASK[:3], 3, identity)
    assert not torch.allclose(alone, whole[:3], atol=1e-2)
    raw = ragged(rewards)
    raw = slow.slow_returns(raw) if name == "WhitenedReturns" else slow.slow_relative(raw, 3, slow.centered)
    flat, theirs = [x for row in raw for x in row], [x for row in raw[3:] for x in row]
    mean = sum(flat) / len(flat)
    handed_in = iter([torch.tensor([sum(theirs), len(theirs)]), torch.tensor(sum((x - mean) ** 2 for x in theirs))])
    found = ADVANTAGES[name]()(rewards[:3], MASK[:3], 3, lambda mine: mine + next(handed_in))
    assert_close(found, whole[:3], rtol=1e-6, atol=1e-6)


def test_arguments_of_advantages_change_them():
    rewards = numbers(4)
    for one, other in [(GroupNormalized(1e-4), GroupNormalized(1.0)), (WhitenedReturns(1.0), WhitenedReturns(0.5))]:
        found = [advantage(rewards, MASK, 3, identity) for advantage in (one, other)]
        assert not torch.allclose(*found, atol=1e-2)


def test_which_advantages_need_groups():
    assert {name for name, cls in ADVANTAGES.items() if not cls.needs_groups} == {"WhitenedReturns"}


# --- objectives ---------------------------------------------------------------------------------------------------


def slow_objective(objective, logprobs, old, advantages):
    low, high = objective.bounds
    bounds = low, low if high is None else high
    losses, clipped = [], []
    for i, n in enumerate(LENGTHS):
        log_ratios = [logprobs[i, t] - old[i, t] for t in range(n)]
        losses.append(slow.slow_clipped(log_ratios, advantages[i, :n], *bounds, isinstance(objective, SequenceRatio)))
        if isinstance(objective, SequenceRatio):
            log_ratios = [sum(log_ratios) / n] * n
        clipped.append([float(not 1 - bounds[0] <= x.exp().item() <= 1 + bounds[1]) for x in log_ratios])
    return losses, clipped


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{type(o).__name__}{o.bounds}")
def test_objectives_equal_loops(objective):
    logprobs, old, advantages = (numbers(*given).nan_to_num(2.0) for given in ((5, 0.3), (6, 0.3), (7,)))
    logprobs.requires_grad_()
    losses, clipped = slow_objective(objective, logprobs, old, advantages)
    loss = objective.loss(logprobs, old, advantages, MASK)
    found = objective.is_clipped(logprobs, old, MASK)
    assert_close(loss[MASK], torch.stack([x for row in losses for x in row]))
    assert_close(found[MASK], torch.tensor([x for row in clipped for x in row]).double())
    assert found[MASK].any()
    (gradient,) = torch.autograd.grad(loss[MASK].sum(), logprobs)
    (expected,) = torch.autograd.grad(sum(x for row in losses for x in row), logprobs)
    assert_close(gradient, expected)  # 0 outside the mask
    if objective.bounds[0] > 0.01:
        assert gradient[MASK].abs().max() > 0.1


def test_golden_objectives():
    ratio = torch.tensor([[1.5, 0.5]], dtype=torch.float64)
    given = ratio.log(), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.float64)
    mask = torch.tensor([[True, True]])
    assert_close(TokenRatio().loss(*given, mask), torch.tensor([[-1.2, -0.5]]).double())
    assert_close(TokenRatio(0.2, 0.28).loss(*given, mask), torch.tensor([[-1.28, -0.5]]).double())
    assert_close(TokenRatio().loss(*given[:2], -given[2], mask), torch.tensor([[1.5, 0.8]]).double())
    assert TokenRatio().is_clipped(*given[:2], mask).tolist() == [[1, 1]]
    assert TokenRatio(0.6).is_clipped(*given[:2], mask).tolist() == [[0, 0]]
    # √(1.5 · 0.5) = 0.866, below 1 - 0.1: a negative advantage stops there, a positive one does not.
    mean = math.sqrt(0.75)
    assert_close(SequenceRatio(0.1).loss(*given, mask), torch.tensor([[-mean, -mean]]).double())
    assert_close(SequenceRatio(0.1).loss(*given[:2], -given[2], mask), torch.tensor([[0.9, 0.9]]).double())


def test_default_bounds_are_those_of_the_papers():
    assert TokenRatio().bounds == (0.2, None)
    assert SequenceRatio().bounds == (3e-4, 4e-4)


def test_at_ratio_1_both_objectives_are_the_policy_gradient():
    """Loss −A, gradient −A ∇ log π, up to how a response's tokens share it."""
    old, advantages = numbers(8), numbers(9)
    advantages = advantages[:, :1].expand_as(MASK)
    for objective in (TokenRatio(), SequenceRatio()):
        logprobs = old.clone().requires_grad_()
        loss = objective.loss(logprobs, old, advantages, MASK)
        assert_close(loss[MASK], -advantages[MASK])
        (gradient,) = torch.autograd.grad(loss[MASK].sum(), logprobs)
        assert_close(gradient[MASK], -advantages[MASK])


# --- aggregations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_aggregations_equal_loops_and_add_up(name):
    losses, aggregation = numbers(10), AGGREGATIONS[name]
    expected = slow.AGGREGATIONS[name](ragged(losses))
    total, count = aggregation(losses, MASK)
    assert (total / count).item() == pytest.approx(expected)
    parts = [aggregation(losses[rows], MASK[rows]) for rows in ([0], [1, 2], [3, 4, 5])]
    assert (sum(part.total for part in parts) / sum(part.count for part in parts)).item() == pytest.approx(expected)


def test_aggregations_differ():
    losses = numbers(11)
    found = {float(a(losses, MASK).total / a(losses, MASK).count) for a in [*AGGREGATIONS.values(), FixedLengthMean(5)]}
    assert len(found) == 4


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (GroupNormalized, {"eps": 0.0}, "`eps` must be above 0, but got 0.0"),
        (WhitenedReturns, {"gamma": 1.1}, "`gamma` must be between 0 and 1, but got 1.1"),
        (WhitenedReturns, {"gamma": -0.1}, "`gamma` must be between 0 and 1"),
        (TokenRatio, {"clip_range": 0.0}, "`clip_range` must be above 0, but got 0.0"),
        (TokenRatio, {"clip_range_high": 0.0}, "`clip_range_high` must be above 0 or None, but got 0.0"),
        (SequenceRatio, {"clip_range": -1.0}, "`clip_range` must be above 0"),
        (SequenceRatio, {"clip_range_high": -1.0}, "`clip_range_high` must be above 0 or None"),
        (FixedLengthMean, {"length": 0}, "`length` must be at least 1, but got 0"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_named(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


# --- on the command line ------------------------------------------------------------------------------------------

FLAGS = [
    ("advantage", "GroupNormalized", {"eps": 0.25}),
    ("advantage", "GroupCentered", {}),
    ("advantage", "LeaveOneOut", {}),
    ("advantage", "WhitenedReturns", {"gamma": 0.75}),
    ("advantage", "WhitenedGroupScores", {}),
    ("objective", "TokenRatio", {"clip_range": 0.25, "clip_range_high": 0.5}),
    ("objective", "SequenceRatio", {"clip_range": 0.125, "clip_range_high": 0.25}),
    ("aggregation", "TokenMean", {}),
    ("aggregation", "SequenceMean", {}),
    ("aggregation", "FixedLengthMean", {"length": 64}),
]


@pytest.fixture(autouse=True)
def _own_arguments_only(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])  # Lightning warns if there are others beside those of `main`


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in ("\1", "\2\3", "\4")))
    return str(path)


def arguments(prompts, *flags):
    return ["fit", "--model=GRPOModule", "--model.model=m", "--data=PromptDataModule", f"--data.data={prompts}", *flags]


def parsed(args, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*args, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]


@pytest.mark.parametrize(("part", "name", "options"), FLAGS, ids=[name for _, name, _ in FLAGS])
def test_each_is_a_flag_and_a_key_in_yaml(part, name, options, prompts, tmp_path, capsys):
    path = f"{compositions.__name__}.{name}"
    expected = {"class_path": path} | ({"init_args": options} if options else {})
    flags = [f"--model.{part}={name}", *(f"--model.{part}.{key}={value}" for key, value in options.items())]
    assert parsed(arguments(prompts, *flags), capsys)[part] == expected
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"model": {"class_path": "GRPOModule", "init_args": {part: expected}}}))
    assert parsed(["fit", f"--config={file}", *arguments(prompts)[2:]], capsys)[part] == expected


def test_flags_become_objects(prompts, policy, tmp_path):
    flags = "--model.advantage=WhitenedReturns --model.advantage.gamma=0.75 --model.objective=SequenceRatio"
    flags += " --model.aggregation=FixedLengthMean --model.aggregation.length=6 --model.group_size=1"
    flags += " --model.rollout_batch_size=2 --model.minibatch_size=2 --model.max_new_tokens=3 --trainer.max_steps=1"
    flags += " --trainer.accelerator=cpu --trainer.logger=false --trainer.log_every_n_steps=1"
    flags += " --trainer.enable_progress_bar=false --trainer.enable_checkpointing=false --model.reward=slow.ones"
    flags += f" --model.model={policy} --trainer.default_root_dir={tmp_path}"
    module = main(arguments(prompts, *flags.split())).model
    assert isinstance(module.advantage, WhitenedReturns)
    assert module.advantage.gamma == 0.75
    assert isinstance(module.objective, SequenceRatio)
    assert module.objective.bounds == (3e-4, 4e-4)
    assert isinstance(module.aggregation, FixedLengthMean)
    assert module.aggregation.length == 6
    assert module.trainer.global_step == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.advantage=LeaveOneOat"], ['"advantage"', "LeaveOneOat"]),
        (["--model.objective=DPO"], ['"objective"', "DPO"]),
        (["--model.advantage=GroupNormalized", "--model.advantage.epsilon=1"], ["epsilon", "accepted: eps"]),
        (["--model.aggregation=FixedLengthMean", "--model.aggregation.lenght=4"], ["lenght", "did you mean length?"]),
        (["--model.aggregation=FixedLengthMean", "--model.aggregation.length=long"], ['"length"', "long"]),
    ],
    ids=str,
)
def test_what_does_not_exist_is_named(flags, words, prompts, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments(prompts, *flags))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert len(message.splitlines()) < 12


def test_a_constructors_complaint_comes_through(prompts):
    with pytest.raises(ValueError, match="`length` must be at least 1, but got 0"):
        main(arguments(prompts, "--model.aggregation=FixedLengthMean", "--model.aggregation.length=0"))
