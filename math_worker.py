"""The process in which `rewards.MathEquality` compares expressions: `python -m lightning_rlhf.math_worker SECONDS`.

It reads pairs [answer, response] as JSON, one a line, and writes for each a line: true, false, or null for an answer
that is no mathematics. A pair that takes more than SECONDS ends the process, whatever it is at: Python's own watchdog
thread needs no cooperation, where an alarm would wait for the end of one multiplication of huge numbers.
"""

import faulthandler
import json
import os
import sys

MARKS = ("$", "\\boxed", "\\(", "\\[")  # of mathematics in a text


def equal(answer: str, response: str) -> bool | None:
    """Whether two texts hold the same mathematics; None if the answer holds none."""
    from math_verify import parse, verify

    answer = answer.rpartition("####")[2].strip()
    is_marked = any(mark in answer for mark in MARKS)
    # Bare LaTeX would be searched for numbers: of `2x` it would take the 2. The library's own timeouts are alarms.
    expected = parse(answer if is_marked else f"${answer}$", parsing_timeout=None)
    if not expected:
        return None
    return bool(verify(expected, parse(response, parsing_timeout=None), timeout_seconds=None))


def main() -> None:
    """Answer until there are no more questions."""
    verdicts, sys.stdout = sys.stdout, sys.stderr  # libraries print
    equal("1", "1")  # imports what it needs
    print("ready", file=verdicts, flush=True)
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            faulthandler.dump_traceback_later(float(sys.argv[1]), exit=True, file=nowhere)
            verdict = equal(*json.loads(line))
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(verdict), file=verdicts, flush=True)


if __name__ == "__main__":
    main()
