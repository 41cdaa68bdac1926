"""Rewards by functions: per response, token or step, plain or async, and what is said when they fail."""

import asyncio
import threading

import numpy as np
import pytest
import torch

from lightning_rlhf.modules.reward_functions import FunctionReward
from lightning_rlhf.modules.reward_terms import Responses

EOS = 0


def given(texts, tokenizer, prompts=None, **columns) -> Responses:
    """Responses of a tokenizer with one token a letter, each but the last ended by an EOS."""
    ids = [[*map(ord, text), EOS] for text in texts]
    ids[-1] = ids[-1][:-1] or [EOS]
    return Responses(prompts or [f"prompt {i}" for i in range(len(texts))], texts, columns, ids, tokenizer)


def returning(values):
    def function(prompts, responses, **columns):
        return values

    return function


# --- what a function is given -------------------------------------------------------------------------------------


def test_token_ids_come_to_those_who_name_them(tokenizer):
    def ids(prompts, responses, token_ids):
        return [len(row) for row in token_ids]

    def all_else(prompts, responses, **columns):
        assert columns.keys() == {"answer"}
        return [0.0, 0.0]

    torch.testing.assert_close(FunctionReward(ids)(given(["ab", "c"], tokenizer)).total, torch.tensor([3.0, 1.0]))
    FunctionReward(all_else)(given(["ab", "c"], tokenizer, answer=[1, 2]))


def test_of_an_object_its_call_is_asked_for_what_it_names(tokenizer):
    class Judge:
        def __call__(self, prompts, responses, token_ids, answer):
            return [row[0] + a for row, a in zip(token_ids, answer, strict=True)]

    reward = FunctionReward(Judge())
    assert reward.name == "Judge"
    assert reward(given(["\1", "\2"], tokenizer, answer=[10, 20])).total.tolist() == [11, 22]


def test_token_ids_that_are_not_there_are_missed():
    def ids(prompts, responses, token_ids):
        return [0.0]

    with pytest.raises(ValueError, match=r"`ids` failed on 1 samples.*need `token_ids`"):
        FunctionReward(ids)(Responses(["p"], ["r"]))
    with pytest.raises(ValueError, match="need `token_ids` and `tokenizer`, but only texts were given"):
        FunctionReward(returning([[1.0]]))(Responses(["p"], ["r"]))


# --- what it may return -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [1, 0],
        (1.0, 0.0),
        [True, False],
        iter([1.0, 0.0]),
        np.array([1.0, 0.0]),
        torch.tensor([1.0, 0.0]),
        [torch.tensor(1.0), np.float32(0)],
    ],
    ids=lambda values: type(values).__name__,
)
def test_numbers_are_rewards_of_responses(tokenizer, values):
    scores = FunctionReward(returning(values))(given(["ab", "c"], tokenizer))
    torch.testing.assert_close(scores.total, torch.tensor([1.0, 0.0]))
    assert scores.per_token is None


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
def test_lists_of_numbers_are_rewards_of_tokens(tokenizer, kind):
    values = [kind([0.5, 0.0, -1.0]), kind([2.0, 1.0, 4.0, 0.25])]
    scores = FunctionReward(returning(values))(given(["ab", "wxyz"], tokenizer))
    torch.testing.assert_close(scores.per_token, torch.tensor([[0.5, 0.0, -1.0, 0.0], [2.0, 1.0, 4.0, 0.25]]))
    torch.testing.assert_close(scores.total, torch.tensor([-0.5, 7.25]))


def test_pairs_are_rewards_of_steps(tokenizer):
    """The first response has steps `1+1.` and `=2`; the second has none."""
    steps = [[(4, 0.5), (6, 1.0)], []]
    scores = FunctionReward(returning(steps))(given(["1+1.=2", "xy"], tokenizer))
    expected = torch.zeros(2, 7)  # the longest has 6 letters and an EOS
    expected[0, 3], expected[0, 5] = 0.5, 1.0
    torch.testing.assert_close(scores.per_token, expected)
    torch.testing.assert_close(scores.total, torch.tensor([1.5, 0.0]))


def test_steps_that_end_in_one_token_add_up(tokenizer):
    scores = FunctionReward(returning([[(1, 1.0), (1, 2.0), (2, 4.0)]]))(given(["ab"], tokenizer))
    assert scores.per_token.tolist() == [[3.0, 4.0]]


def test_an_array_of_pairs_is_steps_only_with_whole_ends(tokenizer):
    scores = FunctionReward(returning([np.array([[1, 3], [2, 4]])]))(given(["ab"], tokenizer))
    assert scores.per_token.tolist() == [[3.0, 4.0]]
    with pytest.raises(ValueError, match=r"returned \[1.0, 3.0\] in place of a pair \(end, reward\), end an integer,"):
        FunctionReward(returning([np.array([[1.0, 3.0]])]))(given(["ab"], tokenizer))


def test_no_steps_in_any_response_is_no_reward(tokenizer):
    scores = FunctionReward(returning([[], []]))(given(["ab", "c"], tokenizer))
    assert scores.total.tolist() == [0, 0]
    assert scores.per_token.tolist() == [[0] * 3] * 2


def test_the_whole_response_may_be_a_step_also_if_it_is_empty(tokenizer):
    def outcome(prompts, responses, **columns):
        return [[(len(response), 1.0)] for response in responses]

    scores = FunctionReward(outcome)(given(["", "ab", ""], tokenizer))
    assert scores.per_token.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]


# --- what is said about the rest ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [[0.0], [1.0, 2.0]],
            "one number per token: got 1 for the 3 tokens of sample 0: prompt 'prompt 0', resp.*'ab'",
        ),
        ([[0.0] * 3, []], "one number per token: got 0 for the 2 tokens of sample 1: prompt 'prompt 1', response 'cd'"),
        ([[0.0] * 3, [0.0] * 3], "one number per token: got 3 for the 2 tokens of sample 1"),
        ([[(3, 1.0)], []], r"cannot be placed \(.*1 to 2.*got 3\) for sample 0: prompt 'prompt 0', response 'ab'"),
        ([[], [(1, 1.0), (0, 1.0)]], r"cannot be placed \(.*1 to 2.*got 0\) for sample 1: prompt 'prompt 1'"),
        ([[], [(1.5, 1.0)]], r"returned \[1.5, 1.0\] in place of a pair \(end, reward\), end an integer, for sample 1"),
        ([[(True, 1.0)], []], r"returned \[True, 1.0\] in place of a pair"),
        ([[(1, 1.0, 2.0)], []], r"returned \[1, 1.0, 2.0\] in place of a pair"),
        ([[(1, 1.0), 2.0], []], r"returned 2.0 in place of a pair"),
        ([[(1, None)], []], "returned None for sample 0: prompt 'prompt 0', response 'ab'"),
        ([[(1, "x")], []], "returned 'x' for sample 0"),
        ([[0.0, 0.0, None], [0.0] * 2], "returned None for sample 0"),
        ([[0.0] * 3, [0.0, [1, 1.0]]], r"returned \[1, 1.0\] for sample 1"),
        ([1.0, None], "returned None for sample 1: prompt 'prompt 1', response 'cd'"),
        (["good", 1], "returned 'good' for sample 0"),
        ("12", "returned '1' for sample 0"),
        ([10**400, 1], "returned 1000.* for sample 0"),
        ([{}, 1], "returned {} for sample 0"),
        (None, "must return one float per response: got None for 2 responses"),
        (3.0, "must return one float per response: got 3.0 for 2 responses"),
        ([1.0, [1.0, 2.0]], "it returned one number for sample 0, and a list of numbers, one per token for sample 1"),
        (
            [[1.0] * 3, [(1, 1.0)]],
            r"one per token for sample 0, and a list of \(end, reward\) pairs for sample 1: prom",
        ),
        ([[], 1.0], r"it returned one number for sample 1, and a list of \(end, reward\) pairs for sample 0"),
        ([[(1, 1.0)], 1.0], r"it returned a list of \(end, reward\) pairs for sample 0, and one number for sample 1"),
    ],
    ids=str,
)
def test_values_that_are_no_rewards_are_named_with_their_sample(tokenizer, values, message):
    with pytest.raises(ValueError, match=message) as caught:
        FunctionReward(returning(values))(given(["ab", "cd"], tokenizer))
    assert str(caught.value).startswith("The reward function `function` ")


def test_an_error_within_a_generator_is_the_functions(tokenizer):
    def lazy(prompts, responses):
        yield 1.0
        raise KeyError("gold")

    with pytest.raises(
        ValueError, match=r"`lazy` failed on 2 samples, the first of which was prompt 'prompt 0'.*KeyErr"
    ):
        FunctionReward(lazy)(given(["ab", "cd"], tokenizer))


# --- async --------------------------------------------------------------------------------------------------------


async def waiting(prompts, responses, **columns):
    await asyncio.sleep(0.001)
    return [len(response) for response in responses]


def test_an_async_function_is_awaited(tokenizer):
    assert FunctionReward(waiting)(given(["ab", "c"], tokenizer)).total.tolist() == [2, 1]


def test_an_async_function_works_where_a_loop_already_runs(tokenizer):
    async def notebook():
        return FunctionReward(waiting)(given(["ab", "c"], tokenizer)).total.tolist()

    assert asyncio.run(notebook()) == [2, 1]


def test_an_object_with_an_async_call_is_awaited_and_may_return_steps(tokenizer):
    class Judge:
        async def __call__(self, prompts, responses, token_ids):
            await asyncio.sleep(0)
            return [[(1, float(len(row)))] for row in token_ids]

    assert FunctionReward(Judge())(given(["ab"], tokenizer)).per_token.tolist() == [[2, 0]]


def test_what_belongs_to_a_loop_can_be_used_again(tokenizer):
    """As a client does that keeps connections open."""
    kept = []

    async def client(prompts, responses):
        kept.append(asyncio.get_running_loop())
        return [float(not torch.is_grad_enabled())]

    reward = FunctionReward(client)
    assert [reward(given(["a"], tokenizer)).total.item() for _ in range(2)] == [1.0, 1.0]
    assert kept[0] is kept[1]


def test_an_async_function_that_fails_is_named(tokenizer):
    async def failing(prompts, responses):
        await asyncio.sleep(0)
        raise TimeoutError("no answer")

    with pytest.raises(ValueError, match=r"`failing` failed on 1 samples.*response 'ab': TimeoutError: no answer"):
        FunctionReward(failing)(given(["ab"], tokenizer))


def test_async_functions_run_beside_each_other(tokenizer):
    """Each waits for the other to have begun."""
    first, second = threading.Event(), threading.Event()

    def meeting(mine, other):
        async def meet(prompts, responses):
            mine.set()
            while not other.is_set():
                await asyncio.sleep(0.001)
            return [1.0]

        return FunctionReward(meet)

    waits = [
        meeting(first, second).start(given(["a"], tokenizer)),
        meeting(second, first).start(given(["a"], tokenizer)),
    ]
    assert [wait().total.item() for wait in waits] == [1.0, 1.0]
