"""Rewards: what names them, weighted lists, normalisation, and what is said when they fail."""

import asyncio
import sys
import threading
from types import ModuleType

import pytest
import torch

from lightning_rlhf.modules.reward_functions import FunctionReward
from lightning_rlhf.modules.reward_models import ModelReward
from lightning_rlhf.modules.reward_terms import Responses, Scores
from lightning_rlhf.modules.scoring import WeightedRewards, reward_terms
from lightning_rlhf.rewards import ExactMatch, HTTPReward


def lengths(prompts, responses, **columns):
    return [len(r) for r in responses]


def shouting(prompts, responses, **columns):
    return [float(r.isupper()) for r in responses]


class Judge:
    def __init__(self, level: float = 1.0):
        if level < 0:
            raise ValueError(f"`level` must be at least 0, but got {level}.")
        self.level = level

    def __call__(self, prompts, responses, **_):
        return [self.level] * len(responses)


@pytest.fixture
def my_rewards(monkeypatch):
    module = ModuleType("my_rewards")
    module.lengths, module.number, module.Judge = lengths, 3, Judge
    monkeypatch.setitem(sys.modules, "my_rewards", module)


def score(spec, prompts, responses, columns=None, weights=None, batch_size=32):
    terms = reward_terms(spec, "float32", batch_size)
    return WeightedRewards(terms, weights)(Responses(prompts, responses, columns or {}))


@pytest.mark.parametrize("spec", [lengths, "my_rewards.lengths", [lengths]], ids=["function", "dotted path", "list"])
def test_functions_come_as_objects_or_dotted_paths(my_rewards, spec):
    scores = score(spec, ["a", "b"], ["xyz", ""])
    torch.testing.assert_close(scores.total, torch.tensor([3.0, 0.0]))
    assert list(scores.components) == ["lengths"]


def test_prompts_responses_and_columns_reach_the_function():
    seen = {}

    def look(**given):
        seen.update(given)
        return [0, 0]

    score(look, ["p", "q"], ["r", "s"], {"answer": [1, 2], "topic": ["x", "y"]})
    assert seen == {"prompts": ["p", "q"], "responses": ["r", "s"], "answer": [1, 2], "topic": ["x", "y"]}


def test_a_callable_object_is_named_by_its_class():
    assert list(score(Judge(), ["p"], ["r"]).components) == ["Judge"]


def raising(prompts, responses, **_):
    raise KeyError("gold")


def wanting(prompts, responses, gold):
    return [0.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raising, r"`raising` failed on 2 samples, the first of which was prompt 'p', response 'r': KeyError: 'gold'"),
        (wanting, r"`wanting` failed on 2 samples.*TypeError.*gold"),
        (lambda prompts, responses: [1.0], r"must return one float per response: got 1 for 2 responses"),
        (lambda prompts, responses: [1.0] * 3, r"got 3 for 2 responses"),
        (lambda prompts, responses: [0.0, float("nan")], r"returned nan for sample 1: prompt 'q', response 's'"),
        (lambda prompts, responses: [float("-inf"), 0.0], r"returned -inf for sample 0: prompt 'p', response 'r'"),
    ],
)
def test_a_function_that_fails_is_named_with_its_sample(function, message):
    with pytest.raises(ValueError, match=message) as caught:
        score(function, ["p", "q"], ["r", "s"])
    assert f"`{function.__name__}`" in str(caught.value)


def test_long_samples_are_shortened_in_messages():
    with pytest.raises(ValueError, match="failed") as caught:
        score(raising, ["p" * 999], ["r" * 999])
    assert len(str(caught.value)) < 400


def test_the_total_is_the_weighted_sum_and_components_are_unweighted():
    prompts, responses = ["p"] * 3, ["AB", "abc", ""]
    scores = score([lengths, shouting], prompts, responses, weights=[0.5, -2.0])
    torch.testing.assert_close(scores.total, torch.tensor([1.0 - 2, 1.5, 0.0]))
    torch.testing.assert_close(scores.components["lengths"], torch.tensor([2.0, 3.0, 0.0]))
    torch.testing.assert_close(scores.components["shouting"], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(score([lengths, shouting], prompts, responses).total, torch.tensor([3.0, 3.0, 0.0]))


def test_weight_0_is_logged_and_not_trained_on(ppo, fit):
    module = fit(ppo(reward=[lengths, shouting, lengths], reward_weights=[1.0, 0.0, -1.0], learning_rate=0.0))
    assert module.samples["reward/lengths"] == [float(len(r)) for r in module.samples["response"]]
    assert module.samples["reward"] == [0.0] * 6
    metrics = module.trainer.callback_metrics
    assert {"rollout/reward/lengths", "rollout/reward/shouting", "rollout/reward/lengths_2"} <= metrics.keys()


def test_equal_names_are_numbered():
    scores = score([lengths, shouting, lengths, lengths], ["p"], ["abc"])
    assert list(scores.components) == ["lengths", "shouting", "lengths_2", "lengths_3"]
    assert scores.total.item() == 9


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], []])
def test_there_must_be_one_weight_per_reward(weights):
    with pytest.raises(
        ValueError, match=f"`reward_weights` must have one weight per reward: 2, but got {len(weights)}"
    ):
        score([lengths, shouting], ["p"], ["r"], weights=weights)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module.f", "`reward=no_such_module.f` is neither the dotted path of a Python function"),
        ("my_rewards.nothing", "`reward=my_rewards.nothing` is neither"),
        ("lengths", "`reward=lengths` is neither"),
        ("runs/no/such.ckpt", "`reward`: there is no checkpoint `runs/no/such.ckpt`"),
    ],
)
def test_a_reward_that_cannot_be_found_is_refused_at_once(ppo, my_rewards, spec, message):
    with pytest.raises(ValueError, match=message):
        ppo(reward=spec)


# --- what a reward may be named by --------------------------------------------------------------------------------


def test_a_class_is_made_with_its_arguments(my_rewards):
    judge = {"class_path": "my_rewards.Judge", "init_args": {"level": 3}}
    assert score(judge, ["p"], ["r"]).total.tolist() == [3]
    assert score({"class_path": "my_rewards.Judge"}, ["p"], ["r"]).total.tolist() == [1]
    assert score("my_rewards.Judge", ["p"], ["r"]).total.tolist() == [1]
    assert score([Judge, Judge(4), judge, "my_rewards.lengths"], ["p"], ["r"]).total.tolist() == [1 + 4 + 3 + 1]


def test_a_checker_by_its_class_path():
    match = {"class_path": "lightning_rlhf.rewards.ExactMatch", "init_args": {"column": "gold", "ignore_case": True}}
    (term,) = reward_terms(match, "float32", 8)
    assert type(term.function) is ExactMatch
    assert term(Responses(["p", "q"], ["Yes", "no"], {"gold": ["yes", "yes"]})).total.tolist() == [1, 0]


@pytest.mark.parametrize("url", ["https://host/score", "http://127.0.0.1:8000"])
def test_a_url_is_a_service(url):
    (term,) = reward_terms(url, "float32", 8)
    assert type(term.function) is HTTPReward
    assert term.function.url == url
    assert term.name == "HTTPReward"


def test_terms_stay_what_they_are():
    model, function = ModelReward("some/model"), FunctionReward(lengths)
    assert reward_terms([model, function], "float32", 8) == [model, function]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class_path": "my_rewards.Nobody"}, "`reward=my_rewards.Nobody` is neither"),
        (
            {"class_path": "my_rewards.lengths"},
            "`reward` must be a class at class_path=my_rewards.lengths, but got <func",
        ),
        ({"path": "my_rewards.Judge"}, "`reward` must be `class_path` and `init_args` in a mapping, but got {'path'"),
        ({"class_path": "my_rewards.Judge", "column": "x"}, "must be `class_path` and `init_args` in a mapping"),
        (
            {"class_path": "my_rewards.Judge", "init_args": {"height": 3}},
            r"Judge cannot be made with {'height': 3}: .*unexpected keyword argument 'height'\. Its arguments are",
        ),
        (
            {"class_path": "my_rewards.Judge", "init_args": {"level": -1}},
            "Judge cannot be made with {'level': -1}: `level` must be at least 0, but got -1. Its",
        ),
        ("lightning_rlhf.rewards.ExactMatch", r"ExactMatch cannot be made with {}: .*'column'"),
        ("my_rewards.number", "`reward` must be a reward model, a function, .*, but got 3"),
        (7, "`reward` must be a reward model, a function, a callable object, a URL, or a list of these, but got 7"),
        ([lengths, None], "or a list of these, but got None"),
        ({"class_path": "collections.Counter"}, r"a list of these, but got Counter\(\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_names_no_reward_is_refused(my_rewards, spec, message):
    with pytest.raises(ValueError, match=message):
        reward_terms(spec, "float32", 8)


# --- what is earned at tokens -------------------------------------------------------------------------------------


def per_letter(prompts, responses, token_ids):
    return [[float(i) for i in row] for row in token_ids]


def first_letters(prompts, responses, **columns):
    return [[(1, 10.0)] for _ in responses]


GIVEN = Responses(["p", "q"], ["\1\2\3", "\4"], {}, [[1, 2, 3, 0], [4, 0]])


def test_tokens_and_steps_are_weighted_and_summed_and_padded_with_0(tokenizer):
    given = Responses(GIVEN.prompts, GIVEN.texts, {}, GIVEN.token_ids, tokenizer)
    terms = [FunctionReward(f) for f in (per_letter, lengths, first_letters)]
    scores = WeightedRewards(terms, [2.0, 100.0, -1.0])(given)
    torch.testing.assert_close(scores.per_token, torch.tensor([[2.0 - 10, 4, 6, 0], [8.0 - 10, 0, 0, 0]]))
    torch.testing.assert_close(scores.total, torch.tensor([12.0 - 10 + 300, 8.0 - 10 + 100]))
    torch.testing.assert_close(scores.components["per_letter"], torch.tensor([6.0, 4.0]))
    torch.testing.assert_close(scores.components["first_letters"], torch.tensor([10.0, 10.0]))


def test_without_token_rewards_there_is_no_part_per_token():
    assert WeightedRewards([FunctionReward(lengths)])(GIVEN).per_token is None
    assert WeightedRewards([FunctionReward(lengths), FunctionReward(per_letter)])(GIVEN).per_token is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e39], ids=["nan", "inf", "beyond float32"])
def test_a_token_reward_that_is_not_finite_is_named(bad):
    def broken(prompts, responses, token_ids):
        return [[0.0, bad, 0.0, 0.0], [0.0, 0.0]]

    with pytest.raises(
        ValueError, match=r"The reward `broken` returned (nan|inf) for token 1 of sample 0: prompt 'p', re"
    ):
        WeightedRewards([FunctionReward(broken)])(GIVEN)


def test_details_of_a_term_are_logged_under_its_name_and_must_be_finite():
    class Detailed:
        name = "detailed"

        def __init__(self, detail):
            self.detail = detail

        def __call__(self, given):
            return Scores(torch.tensor([1.0, 2.0]), {"detail": torch.tensor(self.detail)})

    scores = WeightedRewards([Detailed([3.0, 4.0]), Detailed([5.0, 6.0])], [1.0, 0.0])(GIVEN)
    assert {name: values.tolist() for name, values in scores.components.items()} == {
        "detailed": [1, 2],
        "detailed/detail": [3, 4],
        "detailed_2": [1, 2],
        "detailed_2/detail": [5, 6],
    }
    assert scores.total.tolist() == [1, 2]
    with pytest.raises(ValueError, match="The reward `detailed` returned nan for sample 1: prompt 'q', response"):
        WeightedRewards([Detailed([3.0, float("nan")])])(GIVEN)


def test_async_functions_are_all_started_before_one_is_waited_for():
    """The first cannot end before the second has begun."""
    begun = threading.Event()

    async def first(prompts, responses):
        while not begun.is_set():
            await asyncio.sleep(0.001)
        return [1.0, 1.0]

    def second(prompts, responses):
        begun.set()
        return [2.0, 2.0]

    assert WeightedRewards([FunctionReward(first), FunctionReward(second)])(GIVEN).total.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": ["r"]}, "`texts` must have one entry per prompt: 2, but got 1"),
        ({"columns": {"gold": [1, 2, 3]}}, r"`columns\[gold\]` must have one entry per prompt: 2, but got 3"),
        ({"token_ids": [[1]]}, "`token_ids` must have one entry per prompt: 2, but got 1"),
    ],
)
def test_responses_are_equally_many_of_everything(changes, message):
    with pytest.raises(ValueError, match=message):
        Responses(**({"prompts": ["p", "q"], "texts": ["r", "s"]} | changes))


# --- normalisation ------------------------------------------------------------------------------------------------


def column(name):
    """A reward that is in the data."""

    def function(prompts, responses, **columns):
        return columns[name]

    function.__name__ = name
    return FunctionReward(function)


def batch(**columns) -> Responses:
    size = len(next(iter(columns.values())))
    return Responses(["p"] * size, ["r"] * size, columns, [[1, 0]] * size)


def alone(values):
    return values


def standardised(values, seen) -> list[float]:
    mean = sum(seen) / len(seen)
    std = (sum((s - mean) ** 2 for s in seen) / len(seen)) ** 0.5
    return [(v - mean) / std for v in values]


BATCHES = [([1.0, 2.0, 4.0], [1000.0, 1003.0, 1001.0]), ([0.5, 7.0, 1.0], [998.0, 1002.0, 1003.0])]


def test_each_reward_is_brought_to_one_scale_by_all_scores_so_far():
    rewards = WeightedRewards([column("a"), column("b")], [1.0, -0.5], normalize=True)
    seen_a, seen_b = [], []
    for a, b in BATCHES:
        seen_a, seen_b = seen_a + a, seen_b + b
        scores = rewards(batch(a=a, b=b), reduce=alone)
        pairs = zip(standardised(a, seen_a), standardised(b, seen_b), strict=True)
        torch.testing.assert_close(scores.total, torch.tensor([x - 0.5 * y for x, y in pairs]))
        assert scores.components["a"].tolist() == a  # raw
        assert scores.components["b"].tolist() == b


def test_without_normalize_the_scores_are_as_they_are():
    a, b = BATCHES[0]
    rewards = WeightedRewards([column("a"), column("b")])
    torch.testing.assert_close(rewards(batch(a=a, b=b), reduce=alone).total, torch.tensor([1001.0, 1005.0, 1005.0]))
    assert rewards.state_dict() == {}


def test_an_evaluation_changes_nothing_and_uses_what_is_known():
    rewards = WeightedRewards([column("a")], normalize=True)
    assert rewards(batch(a=[5.0, 9.0])).total.tolist() == [5, 9]  # nothing is known yet
    rewards(batch(a=BATCHES[0][0]), reduce=alone)
    before = rewards.state_dict()
    expected = torch.tensor(standardised([5.0, 9.0], BATCHES[0][0]))
    torch.testing.assert_close(rewards(batch(a=[5.0, 9.0])).total, expected)
    assert rewards.state_dict() == before


class Ranks:
    """Sums over ranks that run one after the other: each is run again until it knows what the others contribute."""

    def __init__(self, size: int) -> None:
        self.contributions: list[dict[int, torch.Tensor]] = [{} for _ in range(size)]

    def of(self, rank: int):
        calls = iter(range(100))

        def reduce(values):
            call = next(calls)
            self.contributions[rank][call] = values
            return sum(mine.get(call, torch.zeros_like(values)) for mine in self.contributions)

        return reduce


def test_two_ranks_are_one_process_with_all_the_data():
    def fresh():
        return WeightedRewards([column("a"), column("b")], [1.0, -0.5], normalize=True)

    one, two = fresh(), [fresh(), fresh()]
    for a, b in BATCHES:
        whole = one(batch(a=a, b=b), reduce=alone).total
        parts = [batch(a=a[:1], b=b[:1]), batch(a=a[1:], b=b[1:])]
        ranks, start = Ranks(2), [rewards.state_dict() for rewards in two]
        for _ in range(3):  # the first sum, then the second, then what comes of both
            totals = []
            for rank, rewards in enumerate(two):
                rewards.load_state_dict(start[rank])
                totals.append(rewards(parts[rank], reduce=ranks.of(rank)).total)
        torch.testing.assert_close(torch.cat(totals), whole)
    assert [rewards.state_dict().keys() for rewards in two] == [{"a", "b"}] * 2
    for name, moments in one.state_dict().items():
        assert two[0].state_dict()[name] == pytest.approx(moments)
        assert two[1].state_dict()[name] == two[0].state_dict()[name]


def test_a_state_goes_on_where_it_stood():
    first, second = (batch(a=a) for a, _ in BATCHES)
    whole = WeightedRewards([column("a")], normalize=True)
    whole(first, reduce=alone)
    resumed = WeightedRewards([column("a"), column("b")], normalize=True)
    resumed.load_state_dict(whole.state_dict() | {"gone": [1.0, 2.0, 3.0]})
    assert resumed.state_dict() == whole.state_dict()
    assert all(type(x) is float for x in whole.state_dict()["a"])
    resumed = WeightedRewards([column("a")], normalize=True)
    resumed.load_state_dict(whole.state_dict())
    torch.testing.assert_close(resumed(second, reduce=alone).total, whole(second, reduce=alone).total, rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7])
def test_a_reward_that_never_varies_counts_nothing(value):
    rewards = WeightedRewards([column("a"), column("b")], normalize=True)
    for count in (1, 2, 7):
        other = [float(i) for i in range(count)]
        scores = rewards(batch(a=[value] * count, b=other), reduce=alone)
        assert scores.total.isfinite().all()
        assert scores.components["a"].tolist() == pytest.approx([value] * count)
    assert WeightedRewards([column("a")], normalize=True)(batch(a=[value] * 3), reduce=alone).total.tolist() == [0] * 3


def test_rounding_is_not_blown_up_to_a_reward():
    rewards = WeightedRewards([column("a")], normalize=True)
    assert rewards(batch(a=[0.3, 0.3 + 3e-8, 0.3 - 3e-8]), reduce=alone).total.tolist() == [0] * 3
    assert rewards(batch(a=[0.3, 0.3 + 3e-2, 0.3 - 3e-2]), reduce=alone).total.abs().max() > 1


def test_far_from_0_no_digits_are_lost():
    near = WeightedRewards([column("a")], normalize=True)(batch(a=[1.0, 2.0, 4.0]), reduce=alone).total
    far = WeightedRewards([column("a")], normalize=True)(batch(a=[1048577.0, 1048578.0, 1048580.0]), reduce=alone).total
    torch.testing.assert_close(far, near)


def test_token_rewards_are_scaled_and_not_shifted():
    def tokens(prompts, responses, **columns):
        return [[2.0, 1.0], [4.0, 3.0]]  # sums 3 and 7: mean 5, standard deviation 2

    scores = WeightedRewards([FunctionReward(tokens)], [3.0], normalize=True)(batch(a=[0, 0]), reduce=alone)
    torch.testing.assert_close(scores.per_token, torch.tensor([[3.0, 1.5], [6.0, 4.5]]))
    torch.testing.assert_close(scores.total, torch.tensor([4.5, 10.5]))
    assert scores.components["tokens"].tolist() == [3, 7]


def test_weight_0_is_logged_and_normalised_away():
    a, b = BATCHES[0]
    scores = WeightedRewards([column("a"), column("b")], [1.0, 0.0], normalize=True)(batch(a=a, b=b), reduce=alone)
    torch.testing.assert_close(scores.total, torch.tensor(standardised(a, a)))
    assert scores.components["b"].tolist() == b
