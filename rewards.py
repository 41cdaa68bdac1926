"""Ready-made rewards: `f(prompts, responses, **columns) -> list of floats`, and objects that are called like that.

In YAML an object is `{class_path: lightning_rlhf.rewards.NumericAnswer, init_args: {column: answer}}`. The checkers
give 1.0 or 0.0. `column` names the column of the prompt data that holds the right answers.
"""

import contextlib
import importlib.util
import json
import math
import re
import subprocess
import sys
import time
import weakref
from fractions import Fraction
from functools import cache
from typing import Any, Literal

import requests

BODY_SHOWN = 200  # characters of an answer that go into an error message


def vader_compound(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """Rule-based sentiment of prompt + response, from -1 to 1 (Hutto & Gilbert 2014); needs `vaderSentiment`."""
    return [_analyzer().polarity_scores(p + r)["compound"] for p, r in zip(prompts, responses, strict=True)]


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


class AnswerChecker:
    """Base of the checkers that compare a response with a right answer; a subclass says how in `check`.

    Args:
        column: of the prompt data, with the right answers.
    """

    def __init__(self, column: str) -> None:
        self.column = column

    def __call__(self, prompts: list[str], responses: list[str], **columns: list) -> list[float]:
        """1.0 for each right response, else 0.0."""
        if self.column not in columns:
            raise ValueError(f"`column={self.column}`: the prompt data has no such column; it has {sorted(columns)}.")
        answers = columns[self.column]
        for i, answer in enumerate(answers):
            if answer is None:
                raise ValueError(f"`column={self.column}` holds no answer for the prompt {prompts[i][-80:]!r}.")
        return [float(self.check(r, str(answer))) for r, answer in zip(responses, answers, strict=True)]

    def check(self, response: str, answer: str) -> bool:
        """Whether the response is right."""
        raise NotImplementedError


class ExactMatch(AnswerChecker):
    """1.0 if the response is the answer, letter by letter.

    Args:
        column: of the prompt data, with the right answers.
        ignore_case: whether `Yes` is `yes`.
        strip: whether white space around response and answer does not count.
    """

    def __init__(self, column: str, ignore_case: bool = False, strip: bool = True) -> None:
        super().__init__(column)
        self.ignore_case, self.strip = ignore_case, strip

    def check(self, response: str, answer: str) -> bool:
        """Whether they are the same."""
        return self._normal(response) == self._normal(answer)

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


_UNSIGNED = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)
# A minus behind a digit, a letter or a bracket subtracts or joins: 10-3, COVID-19. Digits behind a letter or a ^ are no
# number of their own: H2O, cm^2.
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])[-−+])?[$€£]?(?<![A-Za-z0-9_^]){_UNSIGNED}(?: ?/ ?{_UNSIGNED})?")
_LONGEST_NUMBER = 1000  # characters; Python converts no numbers of more than some thousand digits
_MARK = "####"


def numbers_in(text: str) -> list[Fraction]:
    """The numbers of a text, exactly: 42, -3.5, 1,234.50, .5, 1e-3, 3/4, -$7; no words, LaTeX or mixed numbers."""
    found = []
    for match in _NUMBER.finditer(text):
        plain = re.sub(r"[,$€£ ]", "", match[0]).replace("−", "-")
        numerator, _, denominator = plain.partition("/")
        if len(plain) <= _LONGEST_NUMBER and (not denominator or Fraction(denominator)):
            found.append(Fraction(numerator) / Fraction(denominator or 1))
    return found


class NumericAnswer(AnswerChecker):
    """1.0 if the response's number equals the answer's, as exact fractions: 0.5 is 1/2, and 1,000 is 1000.0.

    The answer is the one number in its column, or what follows `####` there, as in GSM8K
    (https://arxiv.org/abs/2110.14168). What numbers may look like: `numbers_in`; for LaTeX take `MathEquality`.

    Args:
        column: of the prompt data, with the right answers.
        tolerance: largest difference that still counts as equal.
        extract: `last` takes the last number of the response; `####` takes the number after its last `####`.
    """

    def __init__(self, column: str, tolerance: float = 0, extract: Literal["last", "####"] = "last") -> None:
        super().__init__(column)
        if tolerance < 0:
            raise ValueError(f"`tolerance` must be at least 0, but got {tolerance}.")
        if extract not in ("last", _MARK):
            raise ValueError(f"`extract` must be `last` or `{_MARK}`, but got {extract!r}.")
        self.tolerance, self.extract = Fraction(str(tolerance)), extract

    def check(self, response: str, answer: str) -> bool:
        """Whether the numbers differ by no more than the tolerance."""
        found = numbers_in(response)[-1:] if self.extract == "last" else _after_mark(response)
        return bool(found) and abs(found[0] - self._expected(answer)) <= self.tolerance

    def _expected(self, answer: str) -> Fraction:
        found = _after_mark(answer) if _MARK in answer else numbers_in(answer)
        if len(found) != 1:
            raise ValueError(
                f"`column={self.column}` must hold one number, or one after `{_MARK}`, but got {answer[-80:]!r}."
            )
        return found[0]


def _after_mark(text: str) -> list[Fraction]:
    """The first number after the last `####`, if there is one."""
    _, mark, end = text.rpartition(_MARK)
    return numbers_in(end)[:1] if mark else []


class RegexFormat:
    r"""1.0 if the response has a form, such as `(?s)<think>.*</think>\s*<answer>.*</answer>`.

    Options go into the pattern: `(?s)` lets `.` be a newline, too, and `(?i)` ignores case.

    Args:
        pattern: a regular expression of Python's `re`.
        full: whether the whole response must match, or some part of it.
    """

    def __init__(self, pattern: str, full: bool = True) -> None:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`pattern` must be a regular expression, but got {pattern!r}: {error}.") from error
        self._matches = compiled.fullmatch if full else compiled.search

    def __call__(self, prompts: list[str], responses: list[str], **columns: list) -> list[float]:
        """1.0 for each response of the form, else 0.0."""
        return [float(self._matches(response) is not None) for response in responses]


class MathEquality(AnswerChecker):
    r"""1.0 if the response's expression is equal to the answer's as mathematics: `$\frac{1}{2}$` is 0.5, `2x` is `x+x`.

    Expressions are read by math-verify (https://github.com/huggingface/Math-Verify) from `\boxed{...}`, `$...$` or
    plain numbers of the response; a text is also right if it is the answer letter by letter. No text is evaluated as
    Python. It runs in a process of its own: an expression such as 9^(9^9) keeps a computer busy for ever, so a process
    that takes too long is ended, and the response counts as wrong.

    Args:
        column: of the prompt data, with the right answers: LaTeX (with or without `$`) or numbers, or what follows
            the last `####`.
        timeout: seconds for one response.
    """

    def __init__(self, column: str, timeout: float = 5.0) -> None:
        super().__init__(column)
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("`MathEquality` needs the package math-verify: pip install 'lightning-rlhf[math]'")
        if timeout <= 0:
            raise ValueError(f"`timeout` must be above 0, but got {timeout}.")
        self.timeout = timeout
        self._worker: subprocess.Popen | None = None

    def check(self, response: str, answer: str) -> bool:
        """Whether they are equal, and found so in time."""
        if response.strip() == answer.strip():
            return True
        self._worker = self._worker or self._started()
        self._worker.stdin.write(json.dumps([answer, response]) + "\n")
        self._worker.stdin.flush()
        verdict = self._worker.stdout.readline()
        if not verdict:  # it has ended itself
            self._end()
            self._worker = None
            return False
        equal = json.loads(verdict)
        if equal is None:
            raise ValueError(f"`column={self.column}` must hold mathematics, but got {answer[:80]!r}.")
        return equal

    def _started(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "lightning_rlhf.math_worker", str(self.timeout)]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, text=True, encoding="utf-8")
        self._end = weakref.finalize(self, _end, worker)
        if worker.stdout.readline() != "ready\n":
            self._end()
            raise ValueError(f"`MathEquality` cannot start its process; what does `{' '.join(command)}` say?")
        return worker


def _end(worker: subprocess.Popen) -> None:
    worker.kill()
    worker.wait()
    worker.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # there was something left to send
        worker.stdin.close()


class HTTPReward:
    """Rewards from a service: POST {"prompts": [...], "responses": [...], "columns": {...}}, answer {"rewards": [...]}.

    No response is ever scored 0 because something failed. What may pass is tried again: a connection that fails, a
    timeout, the statuses 429 and 5xx. Everything else is an error at once.

    Args:
        url: of the service.
        timeout: seconds to wait for a connection, and for each part of the answer.
        retries: attempts after the first.
        batch_size: most responses in one request.
        headers: of every request, such as `{Authorization: Bearer ...}`.
        backoff: seconds before the first retry; they double for each further one.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 30.0,
        retries: int = 3,
        batch_size: int = 64,
        headers: dict[str, str] | None = None,
        backoff: float = 1.0,
    ) -> None:
        limits = {
            "timeout": timeout > 0,
            "retries": retries >= 0,
            "batch_size": batch_size >= 1,
            "backoff": backoff >= 0,
        }
        for name, holds in limits.items():
            if not holds:
                raise ValueError(f"`{name}` of HTTPReward is too small: {locals()[name]}.")
        self.url, self.timeout, self.retries, self.backoff = url, timeout, retries, backoff
        self.batch_size, self.headers = batch_size, dict(headers or {})

    def __call__(self, prompts: list[str], responses: list[str], **columns: list) -> list[float]:
        """What the service gives."""
        rewards = []
        for start in range(0, len(responses), self.batch_size):
            part = slice(start, start + self.batch_size)
            own = {name: values[part] for name, values in columns.items()}
            question = {"prompts": prompts[part], "responses": responses[part], "columns": own}
            rewards += self._read(self._ask(question), len(responses[part]))
        return rewards

    def _ask(self, question: dict[str, Any]) -> requests.Response:
        try:
            body = json.dumps(question, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"The columns {sorted(question['columns'])} cannot be sent as JSON: {error}.") from error
        headers = {"Content-Type": "application/json"} | self.headers
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:  # a redirected POST would arrive as a GET
                answer = requests.post(self.url, body, headers=headers, timeout=self.timeout, allow_redirects=False)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if answer.status_code != 429 and answer.status_code < 500:
                return answer
            problem = _described(answer)
        raise ValueError(f"`{self.url}` gave no rewards in {self.retries + 1} attempts. The last one: {problem}")

    def _read(self, answer: requests.Response, count: int) -> list[float]:
        try:
            rewards = answer.json()["rewards"] if answer.status_code == 200 else None
        except (ValueError, KeyError, TypeError):
            rewards = None
        if not isinstance(rewards, list) or len(rewards) != count or not all(map(_is_reward, rewards)):
            raise ValueError(
                f'`{self.url}` must answer {{"rewards": [...]}} with {count} finite numbers and status 200, but gave '
                f"{_described(answer)}"
            )
        return [float(reward) for reward in rewards]


def _is_reward(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _described(answer: requests.Response) -> str:
    return f"status {answer.status_code}, {answer.text[:BODY_SHOWN]!r}"
