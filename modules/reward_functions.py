"""Rewards by Python functions: per response, per token or per step; plain or `async`."""

import asyncio
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .reward_terms import Responses, Scores
from .token_positions import tokens_of_ends

KINDS = {
    "sequence": "one number",
    "tokens": "a list of numbers, one per token",
    "steps": "a list of (end, reward) pairs",
}


class FunctionReward:
    """A Python function `f(prompts, responses, **columns)`, which returns for each of the B responses

    * a number: the response's reward;
    * or a list of numbers, one for each of its tokens, the EOS included;
    * or a list of pairs (end, reward), one for each of its steps. A step is `response[...:end]`, so `end` is what
      `re.Match.end()` gives; the reward is earned at the token that holds the step's last character.

    It is given `token_ids`, the responses as lists of ids, if it has an argument of that name. An `async` function runs
    in a thread beside the other rewards.

    Args:
        function: the function, or an object that can be called like one.
    """

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self._wants_ids = "token_ids" in _arguments(function)

    def __call__(self, given: Responses) -> Scores:
        """Rewards, with `per_token` if they are of tokens or steps."""
        return self.start(given)()

    def start(self, given: Responses) -> Callable[[], Scores]:
        """Call the function; what is returned gives the rewards, and waits for them if the function is `async`."""
        try:
            token_ids = {"token_ids": _token_ids(given)} if self._wants_ids else {}
            result = self.function(prompts=given.prompts, responses=given.texts, **given.columns, **token_ids)
            result = list(result) if isinstance(result, Iterator) else result
        except Exception as error:
            raise self._failure(given, error) from error
        if not inspect.isawaitable(result):
            return lambda: self._scores(result, given)
        future = asyncio.run_coroutine_threadsafe(_result(result), _event_loop(os.getpid()))

        def wait() -> Scores:
            try:
                values = future.result()
            except Exception as error:
                raise self._failure(given, error) from error
            return self._scores(values, given)

        return wait

    def _failure(self, given: Responses, error: Exception) -> ValueError:
        return ValueError(
            f"The reward function `{self.name}` failed on {len(given.texts)} samples, the first of which was "
            f"{given.shown(0)}: {type(error).__name__}: {error}"
        )

    def _scores(self, result: Any, given: Responses) -> Scores:
        expected = f"The reward function `{self.name}` must return one float per response: got "
        try:
            rows = [_plain(row) for row in result]
        except TypeError as error:
            raise ValueError(f"{expected}{result!r} for {len(given.texts)} responses.") from error
        if len(rows) != len(given.texts):
            raise ValueError(f"{expected}{len(rows)} for {len(given.texts)} responses.")
        kind = self._kind(rows, given)
        if kind == "sequence":
            return Scores(torch.tensor([self._number(row, i, given) for i, row in enumerate(rows)]), {})
        per_token = torch.zeros(len(rows), max(map(len, _token_ids(given)), default=0))
        fill = self._fill_tokens if kind == "tokens" else self._fill_steps
        for i, row in enumerate(rows):
            fill(per_token[i], row, i, given)
        return Scores(per_token.sum(1), {}, per_token)

    def _kind(self, rows: list, given: Responses) -> str:
        """The one kind of all rows; an empty list is of any kind of list, and if all are empty there were no steps."""
        kinds = [_kind(row) for row in rows]
        known = [(kind, i) for i, kind in enumerate(kinds) if kind]
        first, at = known[0] if known else ("steps", 0)
        for i, kind in enumerate(kinds):
            if kind != first and not (kind is None and first != "sequence"):
                raise ValueError(
                    f"The reward function `{self.name}` must return the same kind for all responses: it returned "
                    f"{KINDS[first]} for sample {at}, and {KINDS[kind or 'steps']} for sample {i}: {given.shown(i)}."
                )
        return first

    def _fill_tokens(self, earned: Tensor, row: list, i: int, given: Responses) -> None:
        count = len(given.token_ids[i])
        if len(row) != count:
            raise ValueError(
                f"The reward function `{self.name}` must return one number per token: got {len(row)} for the {count} "
                f"tokens of sample {i}: {given.shown(i)}."
            )
        earned[:count] = torch.tensor([self._number(value, i, given) for value in row])

    def _fill_steps(self, earned: Tensor, row: list, i: int, given: Responses) -> None:
        for pair in row:
            if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int):
                raise self._wrong(f"{pair!r} in place of a pair (end, reward), end an integer,", i, given)
        try:
            tokens = tokens_of_ends([end for end, _ in row], given.texts[i], given.token_ids[i], given.tokenizer)
        except ValueError as error:
            raise self._wrong(f"steps that cannot be placed ({error})", i, given) from error
        for token, (_, reward) in zip(tokens, row, strict=True):
            earned[token] += self._number(reward, i, given)

    def _number(self, value: Any, i: int, given: Responses) -> float:
        try:
            if not isinstance(value, str):
                return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
        raise self._wrong(repr(value), i, given)

    def _wrong(self, what: str, i: int, given: Responses) -> ValueError:
        return ValueError(f"The reward function `{self.name}` returned {what} for sample {i}: {given.shown(i)}.")


def _arguments(function: Callable) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except ValueError:  # of some functions that are written in C
        return set()


def _token_ids(given: Responses) -> list[list[int]]:
    if given.token_ids is None:
        raise ValueError("rewards of tokens or steps need `token_ids` and `tokenizer`, but only texts were given")
    return given.token_ids


def _plain(value: Any) -> Any:
    """Arrays and tensors, tuples and lists of these as lists of Python numbers."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _kind(row: Any) -> str | None:
    if not isinstance(row, list):
        return "sequence"
    if not row:
        return None
    return "steps" if isinstance(row[0], list) else "tokens"


@cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """One event loop of this process for all `async` rewards, in a thread of its own.

    So it works where a loop already runs (a notebook), and a client that keeps connections open finds its loop again.
    """
    loop = asyncio.new_event_loop()

    def run() -> None:
        torch.set_grad_enabled(False)  # this is per thread
        loop.run_forever()

    threading.Thread(target=run, name=f"async rewards of {process}", daemon=True).start()
    return loop


async def _result(awaitable: Awaitable) -> Any:
    return await awaitable
