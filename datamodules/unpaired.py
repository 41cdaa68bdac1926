"""Unpaired labels: single completions that people called good or bad.

Run as: lightning-rlhf fit --config kto.yaml --data.data FILE
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..loaders import EvenBatches, ResumableLoader
from .base import Fate, TextDataModule
from .preferences import PreferenceDataModule, pair, without_ties
from .sources import Source, describe, find_column, iterate, select_roles
from .text import Encoded, check_text, encode_completion, pad, pad_id, padding_mask, render, surely_fits

PAIR = ("prompt", "chosen", "rejected")
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class UnpairedDataModule(TextDataModule):
    """Rows of prompt, completion and label, as text or as chat messages; or pairs, each of which makes two such rows.

    Data without a label column but with columns chosen and rejected are read as by `PreferenceDataModule`, with or
    without a prompt column; chosen becomes a desirable completion, rejected an undesirable one, by whatever margin.

    A batch, padded on the right: `input_ids` (2B, L) int64; `attention_mask` (2B, L) int64; `loss_mask` (2B, L) bool,
    True at the completion with its EOS; `label` (B,) bool, True at desirable completions. The first B rows are the
    examples. The second B have the same prompts, each with the completion of the next row: KTO measures on them how far
    the policy has moved. The last row takes the first one's. "Next" goes by the batches of all processes together, so
    the number of processes changes nothing. A row that is next to itself, alone in its step, has an empty `loss_mask`
    there.

    Args:
        data: Training data: a hub id, a .jsonl, .json, .csv or .parquet file, a folder of those, `vader:NAME` or a
            datasets object; see `TextDataModule`.
        prompt_column: Column of prompts; None looks for prompt, input, query, question, instruction.
        completion_column: Column of completions; None looks for completion, output, response, answer.
        label_column: Column of true or false, or 1 or 0; None looks for label.
        **kwargs: The other arguments of `TextDataModule`.
    """

    def __init__(
        self,
        data: Source,
        prompt_column: str | None = None,
        completion_column: str | None = None,
        label_column: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, **kwargs)
        self.flags = {"prompt": prompt_column, "completion": completion_column, "label": label_column}
        self._pairs = PreferenceDataModule(data, prompt_column)  # knows what a pair is

    def setup(self, stage: str | None = None) -> None:
        """Read and check everything; to train on, it takes both kinds of rows, and batches with a next row."""
        world_size, _ = self.placement()
        for name, size in {"batch_size": self.batch_size, "val_batch_size": self.val_batch_size}.items():
            if size * world_size < 2:
                raise ValueError(
                    f"`{name}` must be at least 2 in one process, but is {size}: each prompt is also read with the "
                    "completion of another row of its batch"
                )
        super().setup(stage)
        if stage in ("fit", None):
            check_both_kinds(self.rows["train"], describe(self.sources["data"], "data"))

    def select(self, dataset: Dataset, where: str) -> Dataset:
        label = find_column(dataset, "label", self.flags["label"], where, required=False)
        if label is not None:
            return select_roles(
                dataset, {role: find_column(dataset, role, flag, where) for role, flag in self.flags.items()}
            )
        if self.flags["completion"] is None and {"chosen", "rejected"} <= set(dataset.column_names):
            pairs = self._pairs.select(dataset, where)
            return pairs.select_columns([name for name in PAIR if name in pairs.column_names])
        raise ValueError(
            f"{where}: no labels to learn from; its columns are {dataset.column_names}; expected prompt, completion "
            "and label (name them with `prompt_column`, `completion_column`, `label_column`), or chosen and rejected"
        )

    def check_row(self, row: dict[str, Any]) -> None:
        if "label" not in row:
            self._pairs.check_row(row)
            return
        if isinstance(check_text(row["prompt"], "prompt", allow_empty=True), str) != isinstance(
            check_text(row["completion"], "completion"), str
        ):
            raise ValueError("prompt and completion must both be text or both be lists of messages")
        as_label(row["label"])

    def measure(self, row: dict[str, Any]) -> Fate:
        if surely_fits("".join(render(self.tokenizer, row["prompt"], row["completion"])[:2]), self.max_length):
            return Fate(cut=False, kept=True)
        ids, loss_mask = encode_completion(self.tokenizer, row["prompt"], row["completion"], None, append_eos=True)
        return Fate(cut=len(ids) > self.max_length, kept=any(loss_mask[: self.max_length]))

    def collate_function(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return partial(collate, tokenizer=self.tokenizer, max_length=self.max_length)

    def _load(self, flag: str) -> DatasetDict:
        where = describe(self.sources[flag], flag)
        return DatasetDict({split: unpaired(rows, where) for split, rows in super()._load(flag).items()})

    def _loader(self, *args: Any, **kwargs: Any) -> ResumableLoader:
        alone = super()._loader(*args, **kwargs)
        return ResumableLoader(
            alone.dataset,
            WithNextRows.of(alone.batches),
            collate_fn=alone.collate_fn,
            num_workers=alone.num_workers,
            persistent_workers=alone.persistent_workers,
            generator=alone.generator,
        )


class WithNextRows(EvenBatches):
    """Batches of twice as many row numbers: the rows themselves, then for each of them the next one of its step.

    A step is what all processes have at one time; after its last row comes its first.
    """

    @classmethod
    def of(cls, batches: EvenBatches) -> "WithNextRows":
        """The same batches, with the next rows."""
        b = batches
        return cls(b.num_rows, b.batch_size, b.num_replicas, b.rank, b.shuffle, b.seed, b.passes, b.lengths)

    def batches(self) -> Iterator[list[int]]:
        """All batches of the epoch, also those that an iteration leaves out."""
        steps = chain.from_iterable(self._steps(number) for number in range(self.passes))
        for rows, step in zip(super().batches(), steps, strict=True):
            following = dict(zip(step, [*step[1:], *step[:1]], strict=True))
            yield [*rows, *(following[row] for row in rows)]


def as_label(value: Any) -> bool:
    """Whether a completion is desirable: true or false, 1 or 0, also from the text of a CSV file."""
    label = LABELS.get(str(value).strip().lower())
    if label is None:
        raise ValueError(f"label must be true or false (or 1 or 0), not {value!r}")
    return label


def check_both_kinds(rows: Dataset, where: str) -> None:
    """Raise a ValueError unless there are desirable rows and undesirable ones."""
    found = {as_label(label) for label in rows["label"]}
    if len(found) == 1:
        only, missing = ("desirable", "undesirable") if True in found else ("undesirable", "desirable")
        raise ValueError(
            f"{where}: unpaired data with only {only} rows teaches no difference; add {missing} ones"
            + (", or imitate these with SFT" if only == "desirable" else "")
        )


def unpaired(rows: Dataset, where: str) -> Dataset:
    """Pairs as two rows each, everything else as it is.

    First comes one answer of every pair, in turn the chosen and the rejected one, then the others: so neighbours have
    different prompts, and any stretch of rows has both kinds.
    """
    if "label" in rows.column_names:
        return rows
    pairs = without_ties(rows, where)
    columns: dict[str, list] = {"prompt": [], "completion": [], "label": []}
    for first_is_chosen in (True, False):
        for number, row in enumerate(iterate(pairs)):
            prompt, chosen, rejected = pair(row)
            label = (number % 2 == 0) == first_is_chosen
            for name, value in zip(columns, (prompt, chosen if label else rejected, label), strict=True):
                columns[name].append(value)
    return Dataset.from_dict(columns)


def encode_mismatch(
    row: dict[str, Any], following: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """A row's prompt with the completion of the next row; nothing is a target where that is the same row."""
    ids, mask = encode_completion(tokenizer, row["prompt"], following["completion"], max_length, append_eos=True)
    return Encoded(ids, [target and row != following for target in mask])


def collate(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Tensor]:
    """Rows, and after them the row that is next to each, to a batch; see `UnpairedDataModule`."""
    rows, following = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    examples = [encode_completion(tokenizer, row["prompt"], row["completion"], max_length, True) for row in rows]
    pairs = zip(rows, following, strict=True)
    mismatches = [encode_mismatch(row, other, tokenizer, max_length) for row, other in pairs]
    ids, loss_masks = zip(*examples, *mismatches, strict=True)
    return {
        "input_ids": pad(ids, "right", pad_id(tokenizer)),
        "attention_mask": padding_mask(ids, "right").long(),
        "loss_mask": pad(loss_masks, "right", False),
        "label": pad([[as_label(row["label"]) for row in rows]], "right", False)[0],
    }
