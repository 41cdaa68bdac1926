"""Supervised fine-tuning: text to imitate.

Run as: lightning-rlhf fit --config sft.yaml --data.data FILE
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .base import Fate, TextDataModule
from .sources import Source, find_column, select_roles
from .text import (
    Encoded,
    Text,
    as_messages,
    check_string,
    check_text,
    encode_completion,
    encode_text,
    pad,
    pad_id,
    padding_mask,
    render,
    split_messages,
    surely_fits,
)


class SFTDataModule(TextDataModule):
    """Rows of plain text, of prompt and completion, or of chat messages.

    Chat messages count as prompt and completion: the last assistant turn is the completion, everything before it the
    prompt, what follows it is left out. Earlier assistant turns are not learned. Without column flags the form is the
    first that the columns allow: messages, prompt and completion, text. A .csv with columns input and output needs no
    flag.

    A batch, padded on the right: `input_ids` (B, L) int64; `attention_mask` (B, L) int64; `loss_mask` (B, L) bool, True
    at tokens that are targets: the completion with its EOS; in plain text every token but the first.

    Args:
        data: Training data: a hub id, a .jsonl, .json, .csv or .parquet file, a folder of those, `vader:NAME` or a
            datasets object; see `TextDataModule`.
        text_column: Column of plain text; None looks for text.
        prompt_column: Column of prompts; None looks for prompt, input, query, question, instruction.
        completion_column: Column of completions; None looks for completion, output, response, answer.
        messages_column: Column of chat messages; None looks for messages, conversations.
        append_eos: End each sequence with the EOS token, so that the model learns to stop.
        **kwargs: The other arguments of `TextDataModule`.
    """

    def __init__(
        self,
        data: Source,
        text_column: str | None = None,
        prompt_column: str | None = None,
        completion_column: str | None = None,
        messages_column: str | None = None,
        append_eos: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, **kwargs)
        self.flags = {
            "messages": messages_column,
            "prompt": prompt_column,
            "completion": completion_column,
            "text": text_column,
        }
        self.append_eos = append_eos

    def select(self, dataset: Dataset, where: str) -> Dataset:
        flagged = [role for role, flag in self.flags.items() if flag is not None]
        forms = [("messages",), ("prompt", "completion"), ("text",)]
        if flagged:
            forms = [form for form in forms if set(form) & set(flagged)]
            if len(forms) > 1:
                raise ValueError(f"{where}: give flags for one form of row, not for {', '.join(flagged)} together")
        for form in forms:
            found = {role: find_column(dataset, role, self.flags[role], where, bool(flagged)) for role in form}
            if all(found.values()):
                return select_roles(dataset, found)
        raise ValueError(
            f"{where}: no columns to learn from; its columns are {dataset.column_names}; expected text, messages, or "
            "prompt and completion; name them with `text_column`, `messages_column`, or `prompt_column` and "
            "`completion_column`"
        )

    def check_row(self, row: dict[str, Any]) -> None:
        if "text" in row:
            check_string(row["text"], "text")
        elif "messages" in row:
            check_text(row["messages"], "messages")
            split_messages(as_messages(row["messages"]))
        elif isinstance(check_text(row["prompt"], "prompt", allow_empty=True), str) != isinstance(
            check_text(row["completion"], "completion"), str
        ):
            raise ValueError("prompt and completion must both be text or both be lists of messages")

    def measure(self, row: dict[str, Any]) -> Fate:
        text = row["text"] if "text" in row else "".join(render(self.tokenizer, *prompt_and_completion(row))[:2])
        if surely_fits(text, self.max_length):
            return Fate(cut=False, kept=True)
        ids, loss_mask = encode(row, self.tokenizer, None, self.append_eos)
        return Fate(cut=len(ids) > self.max_length, kept=any(loss_mask[: self.max_length]))

    def collate_function(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return partial(collate, tokenizer=self.tokenizer, max_length=self.max_length, append_eos=self.append_eos)


def prompt_and_completion(row: dict[str, Any]) -> tuple[Text, Text]:
    """The two texts of a row of messages, or of prompt and completion."""
    return split_messages(row["messages"]) if "messages" in row else (row["prompt"], row["completion"])


def encode(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None, append_eos: bool
) -> Encoded:
    """Ids and loss mask of a row in any of the three forms."""
    if "text" in row:
        return encode_text(tokenizer, row["text"], max_length, append_eos)
    return encode_completion(tokenizer, *prompt_and_completion(row), max_length, append_eos)


def collate(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, append_eos: bool
) -> dict[str, Tensor]:
    """Rows to a batch; see `SFTDataModule`."""
    ids, loss_masks = zip(*[encode(row, tokenizer, max_length, append_eos) for row in rows], strict=True)
    return {
        "input_ids": pad(ids, "right", pad_id(tokenizer)),
        "attention_mask": padding_mask(ids, "right").long(),
        "loss_mask": pad(loss_masks, "right", False),
    }
