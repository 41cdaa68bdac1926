"""Ranked answers: several to a prompt, and the order in which people put them.

Run as: lightning-rlhf fit --config configs/reward_rankings.yaml --data.data FILE
"""

import json
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .base import Fate, TextDataModule
from .origins import as_source, source_column, sources_of, without_source
from .sources import Source, find_column, select_roles
from .text import (
    Encoded,
    Text,
    as_messages,
    as_number,
    check_text,
    encode_completion,
    pad,
    pad_id,
    padding_mask,
    render,
    surely_fits,
)


class RankedList(NamedTuple):
    """A prompt, its responses, and the rank of each: 1 is best, equal ones are ties."""

    prompt: Text
    responses: list[Text]
    ranks: list[float]


class RankingDataModule(TextDataModule):
    """Rows of responses, best first, or of responses and ranks; as text or as chat messages, with or without a prompt.

    Without a prompt, responses of text are whole texts; of messages, those that all begin with are the prompt.

    A batch, padded on the right, holds all responses of all its rows one after the other, N in all: `input_ids` (N, L)
    int64; `attention_mask` (N, L) int64; `group` (N,) int64, the number of the row within the batch; `rank` (N,)
    float32, lower is better, equal within a group is a tie; with a column of sources `source`, a string per row. So a
    batch is `batch_size` lists, and more texts than that.

    Args:
        data: Training data: a hub id, a .jsonl, .json, .csv or .parquet file, a folder of those, `vader:NAME` or a
            datasets object; see `TextDataModule`.
        prompt_column: Column of prompts; None looks for prompt, input, query, question, instruction.
        responses_column: Column of lists of responses (in a CSV file JSON text); None looks for responses.
        ranks_column: Column of lists of ranks, one per response, 1 is best, equal ones are ties; None looks for ranks.
            Without one, responses come best first.
        response_field: Where a response is an object with several fields, the one that holds its text or messages.
        rank_field: The field of such an object that holds its rank.
        source_column: Column of names that say where rows are from; agreement is reported for each. None looks for
            source, with at most 100 different ones.
        **kwargs: The other arguments of `TextDataModule`.
    """

    def __init__(
        self,
        data: Source,
        prompt_column: str | None = None,
        responses_column: str | None = None,
        ranks_column: str | None = None,
        response_field: str | None = None,
        rank_field: str | None = None,
        source_column: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, **kwargs)
        if rank_field is not None and (response_field is None or ranks_column is not None):
            raise ValueError("`rank_field` goes with `response_field`, and takes the place of `ranks_column`")
        self.flags = {"responses": responses_column, "prompt": prompt_column, "ranks": ranks_column}
        self.read = partial(ranked_list, response_field=response_field, rank_field=rank_field)
        self.ranks_are_fields, self.source_column = rank_field is not None, source_column

    def select(self, dataset: Dataset, where: str) -> Dataset:
        roles = {
            role: find_column(dataset, role, flag, where, required=role == "responses")
            for role, flag in self.flags.items()
        }
        roles["source"] = source_column(dataset, self.source_column, where)
        return select_roles(dataset, roles | ({"ranks": None} if self.ranks_are_fields else {}))

    def check_row(self, row: dict[str, Any]) -> None:
        prompt, responses, ranks = self.read(row)
        if len(responses) < 2:
            raise ValueError(f"responses must hold at least 2 to compare, but holds {len(responses)}; delete the row")
        if len(ranks) != len(responses):
            raise ValueError(f"ranks must hold one for each of the {len(responses)} responses, but holds {len(ranks)}")
        if len(set(ranks)) == 1:
            raise ValueError(f"ranks are all {ranks[0]:g}: ties only, which says nothing; delete the row")
        as_source(row.get("source"))
        check_text(prompt, "prompt", allow_empty=True)
        for response in responses:
            check_text(response, "each response")
            if isinstance(response, str) != isinstance(prompt, str):
                raise ValueError("prompt and responses must all be text or all be lists of messages")

    def identity(self, row: dict[str, Any]) -> Any:
        return self.read(row).prompt or without_source(row)

    def wording(self, row: dict[str, Any]) -> str:
        prompt, responses, _ = self.read(row)
        return "".join(map(str, [prompt, *responses]))

    def measure(self, row: dict[str, Any]) -> Fate:
        prompt, responses, ranks = self.read(row)
        texts = ["".join(render(self.tokenizer, prompt, response)[:2]) for response in responses]
        if all(surely_fits(text, self.max_length) for text in texts):
            return Fate(cut=False, kept=True)
        encoded = encode(self.read(row), self.tokenizer, None)
        learnable = all(any(e.loss_mask[: self.max_length]) for e in encoded)
        ends = [(e.ids[: self.max_length], rank) for e, rank in zip(encoded, ranks, strict=True)]
        differ = any(a != b and r != s for (a, r), (b, s) in combinations(ends, 2))  # or nothing is left to compare
        return Fate(cut=any(len(e.ids) > self.max_length for e in encoded), kept=learnable and differ)

    def collate_function(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return partial(collate, read=self.read, tokenizer=self.tokenizer, max_length=self.max_length)


def ranked_list(row: dict[str, Any], response_field: str | None = None, rank_field: str | None = None) -> RankedList:
    """What a row says, whichever way it is written."""
    items = as_list(row["responses"], "responses")
    responses = items if response_field is None else [field(item, response_field) for item in items]
    if rank_field is not None:
        ranks = [field(item, rank_field) for item in items]
    elif "ranks" in row:
        ranks = as_list(row["ranks"], "ranks")
    else:
        ranks = list(range(1, len(items) + 1))
    prompt, responses = (row["prompt"], responses) if "prompt" in row else shared_opening(responses)
    return RankedList(prompt, responses, [as_number(rank, "each of the ranks") for rank in ranks])


def as_list(value: Any, column: str) -> list:
    """A list, also from the JSON text of a CSV file."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"{column} must be a list, but is no valid JSON: {value!r}") from None
    if not isinstance(value, list):
        raise ValueError(f"{column} must be a list, not {value!r}")
    return value


def field(item: Any, name: str) -> Any:
    """A field of a response that is an object."""
    if not isinstance(item, dict) or name not in item:
        raise ValueError(f"each response must be an object with the field {name!r}, not {item!r}")
    return item[name]


def shared_opening(responses: list[Text]) -> tuple[Text, list[Text]]:
    """(prompt, responses) where there is no prompt column: the first messages that all lists share, or no text."""
    if not all(isinstance(response, list) for response in responses):
        return "", responses
    chats = [as_messages(response, "each response") for response in responses]
    turns = list(zip(*chats, strict=False))
    shared = next((i for i, turn in enumerate(turns) if any(m != turn[0] for m in turn)), len(turns))
    return chats[0][:shared] if chats else [], [chat[shared:] for chat in chats]


def encode(row: RankedList, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> list[Encoded]:
    """Every response after the prompt, with its EOS."""
    return [encode_completion(tokenizer, row.prompt, text, max_length, append_eos=True) for text in row.responses]


def collate(
    rows: list[dict[str, Any]],
    read: Callable[[dict[str, Any]], RankedList],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> dict[str, Any]:
    """Rows to a batch; see `RankingDataModule`."""
    lists = [read(row) for row in rows]
    ids = [encoded.ids for one in lists for encoded in encode(one, tokenizer, max_length)]
    return {
        "input_ids": pad(ids, "right", pad_id(tokenizer)),
        "attention_mask": padding_mask(ids, "right").long(),
        "group": pad([[number for number, one in enumerate(lists) for _ in one.responses]], "right", 0)[0],
        "rank": pad([[rank for one in lists for rank in one.ranks]], "right", 0.0)[0],
        **sources_of(rows),
    }
