"""Preference pairs: of two answers to a prompt, which one people chose.

Run as: lightning-rlhf fit --config dpo.yaml --data.data FILE
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from datasets import Dataset, DatasetDict
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .base import Fate, TextDataModule
from .origins import as_source, source_column, sources_of, without_source
from .sources import Source, describe, find_column, iterate, select_roles
from .text import (
    Encoded,
    Text,
    as_number,
    check_text,
    encode_completion,
    pad,
    pad_id,
    padding_mask,
    render,
    split_pair,
    surely_fits,
)


class PreferenceDataModule(TextDataModule):
    """Rows of chosen and rejected, as text or as chat messages, with or without a prompt column.

    Pairs of the same text are left out, and counted in a warning. Without a prompt, what chosen and rejected begin with
    in common is the prompt: whole messages, or text up to the end of the last common word.

    A batch, padded on the right: `input_ids` (2B, L) int64, the B chosen first, then the B rejected, so that one
    forward pass serves both; `attention_mask` (2B, L) int64; `loss_mask` (2B, L) bool, True at the completion with its
    EOS; `margin` (B,) float32, by how much chosen is better, 0 where the data does not say; `preference` (B,) float32,
    share of people who prefer chosen, 1 where the data does not say; with a column of sources `source`, B strings.

    Args:
        data: Training data: a hub id, a .jsonl, .json, .csv or .parquet file, a folder of those, `vader:NAME` or a
            datasets object; see `TextDataModule`.
        prompt_column: Column of prompts; None looks for prompt, input, query, question, instruction.
        chosen_column: Column of the better answers; None looks for chosen.
        rejected_column: Column of the worse answers; None looks for rejected.
        margin_column: Column of numbers that say how much better; None looks for margin.
        preference_column: Column of the shares, 0 to 1, of people who prefer chosen; None looks for preference.
        source_column: Column of names that say where rows are from; agreement is reported for each. None looks for
            source, with at most 100 different ones.
        **kwargs: The other arguments of `TextDataModule`.
    """

    def __init__(
        self,
        data: Source,
        prompt_column: str | None = None,
        chosen_column: str | None = None,
        rejected_column: str | None = None,
        margin_column: str | None = None,
        preference_column: str | None = None,
        source_column: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, **kwargs)
        self.flags = {
            "chosen": chosen_column,
            "rejected": rejected_column,
            "prompt": prompt_column,
            "margin": margin_column,
            "preference": preference_column,
        }
        self.source_column = source_column

    def select(self, dataset: Dataset, where: str) -> Dataset:
        required = ("chosen", "rejected")
        roles = {role: find_column(dataset, role, flag, where, role in required) for role, flag in self.flags.items()}
        return select_roles(dataset, roles | {"source": source_column(dataset, self.source_column, where)})

    def check_row(self, row: dict[str, Any]) -> None:
        chosen, rejected = (check_text(row[name], name, allow_empty="prompt" in row) for name in ("chosen", "rejected"))
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise ValueError("chosen and rejected must both be text or both be lists of messages")
        if chosen == rejected:
            return  # left out later
        if "prompt" in row:
            prompt = check_text(row["prompt"], "prompt", allow_empty=True)
            if isinstance(chosen, str) and not isinstance(prompt, str):
                raise ValueError("prompt is a list of messages while chosen and rejected are text; make them alike")
        _, chosen, rejected = pair(row)
        check_text(chosen, "chosen, after the common prompt,", allow_empty="prompt" in row)
        check_text(rejected, "rejected, after the common prompt,", allow_empty="prompt" in row)
        if "margin" in row:
            as_number(row["margin"], "margin")
        as_source(row.get("source"))
        share = as_number(row.get("preference", 1), "preference")
        if not 0 <= share <= 1:
            raise ValueError(f"preference must be the share of people who prefer chosen, 0 to 1, not {share}")

    def identity(self, row: dict[str, Any]) -> Any:
        return pair(row)[0] or without_source(row)  # all pairs of one prompt on the same side

    def wording(self, row: dict[str, Any]) -> str:
        return super().wording(without_source(row))

    def measure(self, row: dict[str, Any]) -> Fate:
        prompt, chosen, rejected = pair(row)
        texts = ["".join(render(self.tokenizer, prompt, answer)[:2]) for answer in (chosen, rejected)]
        if all(surely_fits(text, self.max_length) for text in texts):
            return Fate(cut=False, kept=True)
        both = encode(row, self.tokenizer, None)
        ends = [encoded.ids[: self.max_length] for encoded in both]
        learnable = all(any(encoded.loss_mask[: self.max_length]) for encoded in both)
        return Fate(cut=any(len(x.ids) > self.max_length for x in both), kept=learnable and ends[0] != ends[1])

    def _load(self, flag: str) -> DatasetDict:
        where = describe(self.sources[flag], flag)
        return DatasetDict({split: without_ties(rows, where) for split, rows in super()._load(flag).items()})

    def collate_function(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return partial(collate, tokenizer=self.tokenizer, max_length=self.max_length)


def without_ties(rows: Dataset, where: str) -> Dataset:
    """The pairs whose texts differ."""
    kept = [number for number, row in enumerate(iterate(rows)) if row["chosen"] != row["rejected"]]
    if not kept:
        raise ValueError(f"{where}: chosen and rejected are the same in every row, which says nothing")
    if len(kept) == len(rows):
        return rows
    ties = len(rows) - len(kept)
    rank_zero_warn(f"{where}: in {ties} of {len(rows)} rows chosen and rejected are the same; they are left out")
    return rows.select(kept, keep_in_memory=True)


def pair(row: dict[str, Any]) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) of a row."""
    return split_pair(row.get("prompt"), row["chosen"], row["rejected"])


def encode(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> tuple[Encoded, Encoded]:
    """Chosen and rejected, each after the prompt and with its EOS."""
    prompt, *answers = pair(row)
    chosen, rejected = (encode_completion(tokenizer, prompt, answer, max_length, append_eos=True) for answer in answers)
    return chosen, rejected


def collate(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """Rows to a batch; see `PreferenceDataModule`."""
    chosen, rejected = zip(*[encode(row, tokenizer, max_length) for row in rows], strict=True)
    ids, loss_masks = zip(*chosen, *rejected, strict=True)
    return {
        "input_ids": pad(ids, "right", pad_id(tokenizer)),
        "attention_mask": padding_mask(ids, "right").long(),
        "loss_mask": pad(loss_masks, "right", False),
        "margin": column(rows, "margin", 0),
        "preference": column(rows, "preference", 1),
        **sources_of(rows),
    }


def column(rows: list[dict[str, Any]], name: str, default: float) -> Tensor:
    """(B,) float32 numbers of a column that the data may lack."""
    return pad([[as_number(row.get(name, default), name)] for row in rows], "right", 0.0)[:, 0]
