"""Ready-made rewards: checkers on tricky strings, and a service that fails in every way it can."""

import json
import threading
import time
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lightning_rlhf import rewards
from lightning_rlhf.modules.reward_terms import Responses
from lightning_rlhf.modules.scoring import WeightedRewards, reward_terms
from lightning_rlhf.rewards import ExactMatch, HTTPReward, MathEquality, NumericAnswer, RegexFormat, numbers_in


def verdict(checker, response, answer) -> float:
    (value,) = checker(["prompt"], [response], answer=[answer])
    assert type(value) is float
    return value


# --- checkers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checker", [ExactMatch("gold"), NumericAnswer("gold")], ids=lambda c: type(c).__name__)
class TestEveryAnswerChecker:
    def test_names_the_columns_that_there_are(self, checker):
        with pytest.raises(ValueError, match=r"`column=gold`: the prompt data has no such column; it has \['a', 'b'\]"):
            checker(["p"], ["r"], b=[1], a=[2])
        with pytest.raises(ValueError, match=r"it has \[\]"):
            checker(["p"], ["r"])

    def test_says_which_prompt_has_no_answer(self, checker):
        with pytest.raises(ValueError, match="`column=gold` holds no answer for the prompt 'q'"):
            checker(["p", "q"], ["1", "2"], gold=[1, None])

    def test_judges_each_response_by_its_own_answer(self, checker):
        assert checker(["p"] * 3, ["1", "2", "3"], gold=[1, 3, 3], other=[0, 0, 0]) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("options", "response", "answer", "expected"),
    [
        ({}, "Paris", "Paris", 1),
        ({}, " Paris\n", "Paris ", 1),
        ({}, "paris", "Paris", 0),
        ({}, "Paris.", "Paris", 0),
        ({}, "", "Paris", 0),
        ({}, "42", 42, 1),
        ({"strip": False}, " Paris", "Paris", 0),
        ({"strip": False}, "Paris", "Paris", 1),
        ({"ignore_case": True}, "pArIs", "PaRiS", 1),
        ({"ignore_case": True}, "STRASSE", "straße", 1),
    ],
)
def test_exact_match(options, response, answer, expected):
    assert verdict(ExactMatch("answer", **options), response, answer) == expected


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("42", [42]),
        ("It is 42.", [42]),
        ("It is 3.14.", ["3.14"]),
        ("Wait...42", [42]),
        ("So it is.42", [42]),
        (".5 and -.25", ["0.5", "-0.25"]),
        ("1,234,567.89", ["1234567.89"]),
        ("1,23", [1, 23]),
        ("1,2345", [1, 2345]),
        ("[1, 2,3]", [1, 2, 3]),
        ("x=-3", [-3]),
        ("−7 (with the sign that typesetters use)", [-7]),
        ("+5", [5]),
        ("10-3", [10, 3]),
        ("(10)-3", [10, 3]),
        ("10 - 3", [10, 3]),
        ("(-3)", [-3]),
        ("COVID-19", [19]),
        ("3/4", ["3/4"]),
        ("-3 / 4", ["-3/4"]),
        ("1.5/0.5", [3]),
        ("5/0", []),
        ("and/or 1/2.", ["1/2"]),
        ("6 / 2 = 3", [3, 3]),
        ("$1,200", [1200]),
        ("-$1,200.50", ["-1200.5"]),
        ("€5", [5]),
        ("50%", [50]),
        ("5km, 2nd, 3x", [5, 2, 3]),
        ("H2O B52 x10", []),
        ("5 cm^2", [5]),
        ("2 m²", [2]),
        ("答案是42。", [42]),
        ("1e-3 and 2E+05", ["1/1000", 200000]),
        ("1e999999999", [1]),
        ("9" * 5000, []),
        ("no number", []),
        ("", []),
        ("3\n/\n4", [3, 4]),
    ],
)
def test_numbers_in_a_text(text, numbers):
    assert numbers_in(text) == [Fraction(number) for number in numbers]


GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = 72.\n#### 1,072"


@pytest.mark.parametrize(
    ("options", "response", "answer", "expected"),
    [
        ({}, "First 3, then 4, so 7.", 7, 1),
        ({}, "7 is what I get after 3 steps", 7, 0),  # the last number counts
        ({}, "1,000", "1000.0", 1),
        ({}, "0.75", "3/4", 1),
        ({}, "0.333", "1/3", 0),
        ({}, "-5", 5, 0),
        ({}, "no idea", 5, 0),
        ({}, "", 0, 0),
        ({}, "1072", GSM8K, 1),
        ({}, "#### 1072", GSM8K, 1),
        ({}, "72", GSM8K, 0),
        ({}, "#### 1072 (in 2 months)", GSM8K, 0),
        ({"extract": "####"}, "#### 1072 (in 2 months)", GSM8K, 1),
        ({"extract": "####"}, "#### 3\nNo:\n####1,072.00", GSM8K, 1),
        ({"extract": "####"}, "1072", GSM8K, 0),
        ({"extract": "####"}, "1072 ####", GSM8K, 0),
        ({"tolerance": 0.01}, "0.333", "1/3", 1),
        ({"tolerance": 0.3}, "1.3", 1, 1),  # exactly at the tolerance, which as a float is less than 3/10
        ({"tolerance": 0.3}, "1.3000001", 1, 0),
        ({"tolerance": 0.3}, "0.7", 1, 1),
        ({}, "0.1", 0.1, 1),
        ({}, "0.0000001", 1e-7, 1),
        ({}, "100,000,000,000,000,000,000,000", 1e23, 1),
    ],
)
def test_numeric_answer(options, response, answer, expected):
    assert verdict(NumericAnswer("answer", **options), response, answer) == expected


@pytest.mark.parametrize("answer", ["none", "", "between 3 and 5", "#### nothing", float("nan"), True])
def test_an_answer_that_is_not_one_number_is_refused(answer):
    with pytest.raises(ValueError, match="`column=answer` must hold one number, or one after `####`, but got"):
        verdict(NumericAnswer("answer"), "3", answer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -1}, "`tolerance` must be at least 0, but got -1"),
        ({"extract": "first"}, "`extract` must be `last` or `####`, but got 'first'"),
    ],
)
def test_options_of_numeric_answer(options, message):
    with pytest.raises(ValueError, match=message):
        NumericAnswer("answer", **options)


THINK = r"<think>.*</think>\s*<answer>.*</answer>"


@pytest.mark.parametrize(
    ("options", "response", "expected"),
    [
        ({"pattern": THINK}, "<think>hm</think> <answer>7</answer>", 1),
        ({"pattern": THINK}, "<think>hm</think> <answer>7</answer> done", 0),
        ({"pattern": THINK, "full": False}, "so <think>hm</think> <answer>7</answer> done", 1),
        ({"pattern": THINK}, "<think>h\nm</think>\n<answer>7</answer>", 0),
        ({"pattern": f"(?s){THINK}"}, "<think>h\nm</think>\n<answer>7</answer>", 1),
        ({"pattern": "[0-9]+"}, "12\n", 0),  # `$` would let the newline pass
        ({"pattern": "yes|no"}, "no", 1),
        ({"pattern": "yes|no"}, "nothing", 0),
        ({"pattern": ""}, "", 1),
    ],
)
def test_regex_format(options, response, expected):
    assert RegexFormat(**options)(["p"], [response], any_column=[1]) == [expected]


def test_what_is_no_regular_expression_is_refused():
    with pytest.raises(ValueError, match=r"`pattern` must be a regular expression, but got '\(': missing \)"):
        RegexFormat("(")


# --- mathematics --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def math_equality():
    return MathEquality("answer", timeout=30)  # loading the library's parts counts, and other tests may run beside


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (r"So it is $\frac{1}{2}$.", "1/2", 1),
        (r"so \boxed{\frac12}", "0.5", 1),
        ("The answer is 0.5", r"\frac{1}{2}", 1),
        ("It is $2\\sqrt 2$", r"\sqrt{8}", 1),
        ("$x+x$", "2x", 1),
        ("$(x+1)^2$", "$x^2 + 2x + 1$", 1),
        ("$x+1$", "x+2", 0),
        ("2", "2x", 0),  # a number within the answer is not the answer
        ("$2$", "$2x$", 0),
        ("It is $3x$", "2x", 0),
        ("5", r"Half of 10, so \boxed{5}.", 1),
        ("72", "48 + 24 = 72\n#### 72", 1),
        ("48", "48 + 24 = 72\n#### 72", 0),
        ("$0.1$", "10%", 1),
        (r"\boxed{\text{Evelyn}}", "Evelyn", 1),
        (r"\boxed{\text{Evelyn}}", "Charles", 0),
        (r"$\{2, 1\}$", r"\{1,2\}", 1),
        (r"\boxed{(1, 2)}", "(1,2)", 1),
        (r"\boxed{(2, 1)}", "(1,2)", 0),
        (r"\boxed{1,234}", 1234, 1),
        ("7", 8, 0),
        ("no idea", 8, 0),
        ("", 8, 0),
        ("x + 1 ", "x + 1", 1),  # letter by letter
        ('\u2028\n$1$ \U0001f389 \\ "', 1, 1),
    ],
)
def test_math_equality(math_equality, response, answer, expected):
    assert verdict(math_equality, response, answer) == expected


def test_an_answer_without_mathematics_is_refused(math_equality):
    with pytest.raises(ValueError, match="`column=answer` must hold mathematics, but got ''"):
        verdict(math_equality, "5", "")


def test_a_power_that_never_ends_is_wrong_and_the_next_response_is_judged(math_equality):
    impatient = MathEquality("answer", timeout=3)
    assert impatient(["p"] * 2, ["$9^{9^{9}}$", "$7$"], answer=["7"] * 2) == [0.0, 1.0]


def test_text_is_not_run_as_python(math_equality, tmp_path):
    mark = tmp_path / "mark"
    evil = f"__import__('pathlib').Path('{mark}').touch()"
    for response in (evil, f"${evil}$", rf"\boxed{{{evil}}}"):
        assert verdict(math_equality, response, "5") == 0
        assert verdict(math_equality, "5", f"1 + {response}") == 0
    assert not mark.exists()


def test_the_process_ends_with_the_checker(math_equality):
    checker = MathEquality("answer")
    verdict(checker, "$1$", "2")
    process = checker._worker
    assert process.poll() is None
    del checker
    assert process.poll() is not None


def test_a_process_that_cannot_start_is_an_error(math_equality, monkeypatch):
    monkeypatch.setattr(rewards.sys, "executable", "false")
    with pytest.raises(
        ValueError, match=r"`MathEquality` cannot start its process; what does `false -m lightning_rlhf.math"
    ):
        verdict(MathEquality("answer"), "$1$", "2")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package math-verify: pip install 'lightning-rlhf\[math\]'"):
        MathEquality("answer")


def test_seconds_are_above_0(math_equality):
    with pytest.raises(ValueError, match="`timeout` must be above 0, but got 0"):
        MathEquality("answer", timeout=0)


# --- a service ----------------------------------------------------------------------------------------------------


class Service:
    """A server in a thread. `answers` are tried in order, the last for ever: (status, body), or a function of the
    question that gives these, or None, which closes the connection without an answer."""

    def __init__(self) -> None:
        self.questions: list[dict] = []
        self.headers: list[dict] = []
        self.answers = [self.lengths]
        service, self.release = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = service.answers[min(len(service.questions), len(service.answers) - 1)]
                service.questions.append(question)
                service.headers.append(dict(self.headers))
                status, body = (answer(question) if callable(answer) else answer) or (None, "")
                if status is None:
                    return
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/score"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @staticmethod
    def lengths(question):
        return 200, json.dumps({"rewards": [len(r) for r in question["responses"]]})

    def hang(self, question):
        self.release.wait(60)


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    service = Service()
    yield service
    service.release.set()
    service.server.shutdown()
    service.server.server_close()


@pytest.fixture
def naps(monkeypatch) -> list[float]:
    naps = []
    monkeypatch.setattr(rewards.time, "sleep", naps.append)
    return naps


TEXTS = ["a", "bb", "ccc", "", "é🎉"]


def ask(service, **options):
    reward = HTTPReward(service.url, **options)
    return reward([f"p{i}" for i in range(5)], TEXTS, topic=list("vwxyz"))


def test_a_service_gets_prompts_responses_and_columns_in_batches(service):
    assert ask(service, batch_size=2, headers={"Authorization": "Bearer x"}) == [1, 2, 3, 0, 2]
    assert service.questions == [
        {"prompts": ["p0", "p1"], "responses": ["a", "bb"], "columns": {"topic": ["v", "w"]}},
        {"prompts": ["p2", "p3"], "responses": ["ccc", ""], "columns": {"topic": ["x", "y"]}},
        {"prompts": ["p4"], "responses": ["é🎉"], "columns": {"topic": ["z"]}},
    ]
    assert {(h["Authorization"], h["Content-Type"]) for h in service.headers} == {("Bearer x", "application/json")}


def test_a_url_is_a_reward(service):
    scores = WeightedRewards(reward_terms(service.url, "float32", 8), [2.0])(Responses(["p"] * 5, TEXTS))
    assert scores.total.tolist() == [2, 4, 6, 0, 4]
    assert list(scores.components) == ["HTTPReward"]
    assert len(service.questions) == 1


@pytest.mark.parametrize("failure", [(500, "oops"), (503, ""), (429, "slow down"), None], ids=str)
def test_what_may_pass_is_tried_again_after_longer_and_longer_naps(service, naps, failure):
    service.answers = [failure, failure, service.lengths]
    assert ask(service, retries=2, backoff=0.5) == [1, 2, 3, 0, 2]
    assert naps == [0.5, 1.0]
    assert len(service.questions) == 3
    assert service.questions[0] == service.questions[2]


def test_after_the_last_retry_the_last_problem_is_told(service, naps):
    service.answers = [(500, "first"), (502, "second"), (503, "third " * 100)]
    with pytest.raises(
        ValueError, match=rf"`{service.url}` gave no rewards in 3 attempts. .*503, 'third third"
    ) as caught:
        ask(service, retries=2)
    assert naps == [1.0, 2.0]
    assert len(str(caught.value)) < 400


def test_a_service_that_hangs_is_given_up_and_may_recover(service, naps):
    service.answers = [service.hang, service.lengths]
    assert ask(service, timeout=0.2, retries=1) == [1, 2, 3, 0, 2]
    service.questions.clear()
    service.answers = [service.hang]
    with pytest.raises(ValueError, match=rf"`{service.url}` gave no rewards in 1 attempts. .*ReadTimeout"):
        ask(service, timeout=0.2, retries=0)


def test_where_nobody_listens_is_an_error(service, naps):
    service.server.server_close()
    with pytest.raises(ValueError, match=r"gave no rewards in 4 attempts. The last one: ConnectionError"):
        ask(service)
    assert naps == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "answer",
    [
        (200, '{"rewards": [1, 2, 3, 4]}'),
        (200, '{"rewards": [1, 2, 3, 4, 5, 6]}'),
        (200, '{"rewards": [1, 2, NaN, 4, 5]}'),
        (200, '{"rewards": [1, 2, Infinity, 4, 5]}'),
        (200, '{"rewards": [1, 2, null, 4, 5]}'),
        (200, '{"rewards": [1, 2, "3", 4, 5]}'),
        (200, '{"rewards": [[1], [2], [3], [4], [5]]}'),
        (200, '{"rewards": 5}'),
        (200, '{"scores": [1, 2, 3, 4, 5]}'),
        (200, "[1, 2, 3, 4, 5]"),
        (200, '{"rewards": [1, 2,'),
        (200, "<html>welcome</html>"),
        (200, ""),
        (201, '{"rewards": [1, 2, 3, 4, 5]}'),
        (302, "moved"),
        (400, "bad request"),
        (401, "who are you?"),
        (404, "not here"),
    ],
    ids=str,
)
def test_everything_else_is_an_error_at_once(service, naps, answer):
    service.answers = [answer]
    with pytest.raises(
        ValueError, match=f"`{service.url}` must answer .* with 5 finite numbers and status 200"
    ) as caught:
        ask(service)
    assert f"status {answer[0]}, {answer[1]!r}" in str(caught.value)
    assert len(service.questions) == 1
    assert naps == []


def test_a_failure_in_a_later_batch_is_an_error_too(service, naps):
    service.answers = [service.lengths, (200, '{"rewards": [1]}')]
    with pytest.raises(ValueError, match="with 2 finite numbers"):
        ask(service, batch_size=2)


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), time], ids=["set", "nan", "module"])
def test_columns_that_are_no_json_are_named(service, value):
    with pytest.raises(ValueError, match=r"The columns \['gold'\] cannot be sent as JSON"):
        HTTPReward(service.url)(["p"], ["r"], gold=[value])
    assert service.questions == []


@pytest.mark.parametrize("option", [{"timeout": 0}, {"retries": -1}, {"batch_size": 0}, {"backoff": -1.0}], ids=str)
def test_limits_are_checked(option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"`{name}` of HTTPReward is too small: {value}"):
        HTTPReward("http://host", **option)
