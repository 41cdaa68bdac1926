"""A run's folder read back. Every file is optional, and none is trusted to be whole: the run may have been killed."""

import contextlib
import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

Columns = dict[str, list]
Row = dict[str, float]

KNOWN_FILES = ("metrics.csv", "validation.csv", "samples.csv", "run.json", "alarms.jsonl", "summary.json")
_TEXT_COLUMNS = ("prompt", "response", "reference_response")
_NEEDED = ("prompt", "response", "reward")  # of held-out rows
_KEYS = ("epoch", "step")


@dataclass(frozen=True)
class Run:
    """What a folder tells about a run; a missing file is an empty value here.

    Args:
        folder: where the files are.
        history: rows of metrics.csv, one for each optimizer step at which something was logged, in order.
        evaluations: rows of validation.csv as columns, by the number of finished iterations; 0 is before training.
        samples: rows of samples.csv, all of them text.
        alarms: objects of alarms.jsonl.
        provenance: run.json.
        summary: summary.json.
        goals: goals.json, what the run was to reach.
        config: config.yaml as text.
        reliability: rows of reliability.csv.
        token_views: paths relative to the folder.
    """

    folder: Path
    history: list[Row] = field(default_factory=list)
    evaluations: dict[float, Columns] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    goals: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    reliability: list[Row] = field(default_factory=list)
    token_views: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the run is called: its folder's name."""
        return self.folder.resolve().name

    @cached_property
    def names(self) -> list[str]:
        """Names of all logged metrics."""
        return sorted({name for row in self.history for name in row} - set(_KEYS))

    @property
    def samples_responses(self) -> bool:
        """Whether it is a run of an on-policy method: its natural axis is the iteration."""
        return any(name.startswith("rollout/") for name in self.names)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """A metric over finished iterations (on-policy methods) or optimizer steps.

        A rollout of iteration e is made by the policy that has finished e iterations; validation comes after them. What
        is logged several times within an iteration is spread evenly over it.
        """
        rows = [row for row in self.history if name in row]
        values = [row[name] for row in rows]
        if not self.samples_responses:
            return [row.get("step", -1) + 1 for row in rows], values
        epochs = [row.get("epoch", 0) for row in rows]
        counts, seen, x = Counter(epochs), Counter(), []
        for epoch in epochs:
            x.append(epoch + (seen[epoch] + name.startswith("val/")) / counts[epoch])
            seen[epoch] += 1
        return x, values

    def first_and_last(self, name: str) -> tuple[float, float] | None:
        """A metric's first and last value; None if it was not logged."""
        values = [row[name] for row in self.history if name in row]
        return (values[0], values[-1]) if values else None

    @property
    def before(self) -> Columns | None:
        """The held-out samples of the first evaluation; None if there is no later one to compare with."""
        return self.evaluations[min(self.evaluations)] if len(self.evaluations) > 1 else None

    @property
    def after(self) -> Columns | None:
        """The held-out samples of the last evaluation."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else None


def read_run(folder: str | Path) -> Run:
    """Read what there is.

    Args:
        folder: a run's `default_root_dir`.

    Raises:
        ValueError: if the folder is not there or has none of a run's files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be the folder of a run, but {folder} is not a folder.")
    if not is_run(folder):
        raise ValueError(f"`folder` must hold a run's files ({', '.join(KNOWN_FILES)}), but {folder} has none of them.")
    numbered = [path for path in folder.glob("metrics_*.csv") if path.stem[8:].isdigit()]
    parts = [*sorted(numbered, key=lambda path: int(path.stem[8:])), folder / "metrics.csv"]
    return Run(
        folder,
        history=merged([numeric_rows(path) for path in parts]),
        evaluations=evaluations(rows_of(folder / "validation.csv")),
        samples=rows_of(folder / "samples.csv"),
        alarms=json_lines(folder / "alarms.jsonl"),
        provenance=json_object(folder / "run.json"),
        summary=json_object(folder / "summary.json"),
        goals=json_object(folder / "goals.json"),
        config=text_of(folder / "config.yaml"),
        reliability=numeric_rows(folder / "reliability.csv"),
        token_views=[f"tokens/{path.name}" for path in sorted(folder.glob("tokens/*.html"), key=_natural)],
    )


def is_run(folder: Path) -> bool:
    """Whether a folder has a file that only a run leaves."""
    return any((folder / name).is_file() for name in KNOWN_FILES)


def rows_of(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file. A row that was cut off is left out: it lacks columns, or its line break."""
    text = text_of(path).replace("\0", "")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = []
    with contextlib.suppress(csv.Error):  # such as a field that a missing quote made endless: what came before is good
        rows.extend(reader)
    if rows and not text.endswith("\n"):
        rows.pop()
    return [row for row in rows if None not in row.values()]


def numeric_rows(path: Path) -> list[Row]:
    """Rows of a CSV file with the fields that are numbers; empty fields are left out."""
    numbers = ({name: number(value) for name, value in row.items() if name} for row in rows_of(path))
    return [{name: value for name, value in row.items() if value is not None} for row in numbers]


def number(text: Any) -> float | None:
    """A field as a number (NaN is one), or None."""
    try:
        return float({"True": 1, "False": 0}.get(text, text))
    except (TypeError, ValueError):
        return None


def merged(parts: Iterable[list[Row]]) -> list[Row]:
    """One history from the parts that the starts of a run left, older first.

    A resumed run repeats what the killed one did after its last checkpoint: from where a later part begins, it counts.
    What was logged at the same step becomes one row.
    """
    rows: list[Row] = []
    for part in parts:
        begin = min((_step(row) for row in part), default=math.inf)
        rows = [row for row in rows if _step(row) < begin] + part
    joined: dict[tuple, Row] = {}
    for row in rows:
        key = row.get("epoch"), row.get("step")
        joined[key] = joined.get(key, {}) | row
    return sorted(joined.values(), key=_step)


def evaluations(rows: list[dict[str, str]]) -> dict[float, Columns]:
    """Rows of validation.csv as columns, by finished iterations; evaluations within an iteration are spread over it."""
    groups: dict[tuple[float, float], list[dict[str, str]]] = {}
    for row in rows:
        iteration = number(row.get("iteration"))
        if iteration is not None and math.isfinite(iteration):
            groups.setdefault((iteration, number(row.get("step")) or 0.0), []).append(row)
    steps = [sorted(step for other, step in groups if other == iteration) for iteration, _ in groups]
    places = [it + order.index(step) / len(order) for (it, step), order in zip(groups, steps, strict=True)]
    columns = dict(zip(places, map(_columns, groups.values()), strict=True))
    return {place: columns[place] for place in sorted(columns) if set(_NEEDED) <= set(columns[place])}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line, without broken lines."""
    found = (_json(line) for line in text_of(path).splitlines())
    return [each for each in found if isinstance(each, dict)]


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty if there is none, or a broken one."""
    found = _json(text_of(path))
    return found if isinstance(found, dict) else {}


def text_of(path: Path) -> str:
    """A file's text; empty if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _step(row: Row) -> float:
    return row.get("step", row.get("epoch", 0.0))


def _columns(rows: list[dict[str, str]]) -> Columns:
    names = [name for name in rows[0] if name and name not in ("iteration", "step")]
    columns: Columns = {}
    for name in names:
        texts = [row[name] for row in rows]
        if name in _TEXT_COLUMNS:
            columns[name] = texts
            continue
        values = [number(text) for text in texts]
        if any(value is not None for value in values):  # else a column of other evaluations
            columns[name] = [math.nan if value is None else value for value in values]
    return columns


def _natural(path: Path) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
