"""Rated text: what several people, or one, thought of it in numbers.

Run as: lightning-rlhf fit --config reward.yaml --data.data vader:movieReviewSnippets
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .base import Fate, TextDataModule
from .origins import as_source, source_column, sources_of, without_source
from .sources import Source, find_column, select_roles
from .text import (
    Encoded,
    as_number,
    check_string,
    check_text,
    encode_completion,
    encode_text,
    pad,
    pad_id,
    padding_mask,
    render,
    surely_fits,
)


class RatingDataModule(TextDataModule):
    """Rows of text, or of prompt and completion, with ratings: a list of numbers or one number.

    Prompt and completion are joined as in the other DataModules, so a rated answer reads like a generated one.

    A batch, padded on the right: `input_ids` (B, L) int64; `attention_mask` (B, L) int64; `ratings` (B, N) float32,
    filled up with 0; `ratings_mask` (B, N) bool, True at ratings that were given; with a column of sources `source`, B
    strings.

    Args:
        data: Training data: a hub id, a .jsonl, .json, .csv or .parquet file, a folder of those, `vader:NAME` or a
            datasets object; see `TextDataModule`.
        text_column: Column of whole texts; None looks for text, unless a prompt or completion column is named.
        prompt_column: Column of prompts; None looks for prompt, input, query, question, instruction.
        completion_column: Column of completions; None looks for completion, output, response, answer.
        ratings_column: Column of ratings; None looks for ratings, rating.
        source_column: Column of names that say where rows are from; agreement is reported for each. None looks for
            source, with at most 100 different ones.
        rating_min: Least rating that is possible; a lower one in the data is an error. None does not check.
        rating_max: Greatest rating that is possible; a higher one in the data is an error. None does not check.
        append_eos: End each text with the EOS token, where a reward model reads its score.
        **kwargs: The other arguments of `TextDataModule`.
    """

    def __init__(
        self,
        data: Source,
        text_column: str | None = None,
        prompt_column: str | None = None,
        completion_column: str | None = None,
        ratings_column: str | None = None,
        source_column: str | None = None,
        rating_min: float | None = None,
        rating_max: float | None = None,
        append_eos: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, **kwargs)
        if text_column is not None and (prompt_column is not None or completion_column is not None):
            raise ValueError("give `text_column`, or `prompt_column` and `completion_column`, not both")
        if rating_min is not None and rating_max is not None and rating_min >= rating_max:
            raise ValueError(f"`rating_min`={rating_min} must be less than `rating_max`={rating_max}")
        self.text_column, self.ratings_column, self.source_column = text_column, ratings_column, source_column
        self.prompt_column, self.completion_column = prompt_column, completion_column
        self.rating_min, self.rating_max = rating_min, rating_max
        self.append_eos = append_eos

    def select(self, dataset: Dataset, where: str) -> Dataset:
        columns = {"ratings": find_column(dataset, "ratings", self.ratings_column, where)}
        two_columns = self.prompt_column is not None or self.completion_column is not None
        if not two_columns:
            columns["text"] = find_column(dataset, "text", self.text_column, where, required=False)
        if two_columns or columns["text"] is None:
            columns["prompt"] = find_column(dataset, "prompt", self.prompt_column, where, two_columns)
            columns["completion"] = find_column(dataset, "completion", self.completion_column, where, two_columns)
            if columns["prompt"] is None or columns["completion"] is None:
                raise ValueError(
                    f"{where}: no text that the ratings belong to; its columns are {dataset.column_names}; name one "
                    "with `text_column`, or two with `prompt_column` and `completion_column`"
                )
        return select_roles(dataset, columns | {"source": source_column(dataset, self.source_column, where)})

    def check_row(self, row: dict[str, Any]) -> None:
        if "text" in row:
            check_string(row["text"], "text")
        elif isinstance(check_text(row["prompt"], "prompt", allow_empty=True), str) != isinstance(
            check_text(row["completion"], "completion"), str
        ):
            raise ValueError("prompt and completion must both be text or both be lists of messages")
        as_source(row.get("source"))
        low = -float("inf") if self.rating_min is None else self.rating_min
        high = float("inf") if self.rating_max is None else self.rating_max
        for rating in as_ratings(row["ratings"]):
            if not low <= rating <= high:
                raise ValueError(f"rating {rating} is out of range: `rating_min`={low}, `rating_max`={high}")

    def identity(self, row: dict[str, Any]) -> Any:
        return super().identity(without_source(row))

    def wording(self, row: dict[str, Any]) -> str:
        return super().wording(without_source(row))

    def measure(self, row: dict[str, Any]) -> Fate:
        text = row.get("text") or "".join(render(self.tokenizer, row["prompt"], row["completion"])[:2])
        if surely_fits(text, self.max_length):
            return Fate(cut=False, kept=True)
        return Fate(cut=len(encode(row, self.tokenizer, None, self.append_eos).ids) > self.max_length, kept=True)

    def collate_function(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return partial(collate, tokenizer=self.tokenizer, max_length=self.max_length, append_eos=self.append_eos)


def as_ratings(value: Any) -> list[float]:
    """Ratings from a list, a number, or the text of a CSV file ("3" or "[3, 4]")."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"ratings must be a list of numbers, not {value!r}") from None
    ratings = [as_number(rating, "each of the ratings") for rating in (value if isinstance(value, list) else [value])]
    if not ratings:
        raise ValueError("ratings is empty: at least one rater is needed; delete the row")
    return ratings


def encode(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None, append_eos: bool
) -> Encoded:
    """The tokens that the ratings belong to."""
    if "text" in row:
        return encode_text(tokenizer, row["text"], max_length, append_eos)
    return encode_completion(tokenizer, row["prompt"], row["completion"], max_length, append_eos)


def collate(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, append_eos: bool
) -> dict[str, Any]:
    """Rows to a batch; see `RatingDataModule`."""
    ids = [encode(row, tokenizer, max_length, append_eos).ids for row in rows]
    ratings = [as_ratings(row["ratings"]) for row in rows]
    return {
        "input_ids": pad(ids, "right", pad_id(tokenizer)),
        "attention_mask": padding_mask(ids, "right").long(),
        "ratings": pad(ratings, "right", 0.0),
        "ratings_mask": padding_mask(ratings, "right"),
        **sources_of(rows),
    }
