"""Where rows come from: an optional column of names, by which agreement with people is then reported."""

from typing import Any

from datasets import Dataset, Value

from .sources import find_column

COLUMN = "source"
MOST_NAMES = 100
"""A column with more different values holds something else, such as texts, unless a flag names it."""


def source_column(dataset: Dataset, wanted: str | None, where: str) -> str | None:
    """The column that the flag names, else `source` if it holds names."""
    if wanted is not None:
        return find_column(dataset, "source", wanted, where)
    return COLUMN if COLUMN in dataset.column_names and _holds_names(dataset) else None


def _holds_names(dataset: Dataset) -> bool:
    kind = dataset.features[COLUMN]
    is_plain = isinstance(kind, Value) and kind.dtype.startswith(("string", "large_string", "int", "null"))
    return is_plain and len(dataset.unique(COLUMN)) <= MOST_NAMES


def as_source(value: Any) -> str:
    """A row's source as text; nothing where the row does not say."""
    if value is None:
        return ""
    if not isinstance(value, str | int):
        raise ValueError(f"source must be text or a whole number, not {value!r}")
    return str(value)


def sources_of(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The part of a batch that says where its rows are from; nothing without such a column."""
    return {"source": [as_source(row["source"]) for row in rows]} if "source" in rows[0] else {}


def without_source(row: dict[str, Any]) -> dict[str, Any]:
    """What counts of a row: its source decides neither its side of a split nor its place in a batch."""
    return {name: value for name, value in row.items() if name != "source"}
