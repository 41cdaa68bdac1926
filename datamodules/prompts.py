"""Prompts for on-policy learning: the model answers them itself.

Run as: lightning-rlhf fit --config ppo.yaml --data.data vader:movieReviewSnippets --data.opening_tokens 4
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from .base import Fate, TextDataModule, at_least
from .sources import Source, find_column
from .text import check_string, check_text, encode_prompt, pad, pad_id, padding_mask, render_prompt, surely_fits

# The prompt's column in here. A name of its own, since the others go to the reward function under theirs.
_PROMPT = "__prompt__"

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class PromptStream:
    """The training prompts without end, shared out over processes.

    The k-th pass over the data is a permutation that `seed` and k alone decide. All processes walk it together: each
    takes its own n of the next n * world_size prompts. So no prompt is lost or given twice in a pass, even by a take
    that reaches into the next one, and one number, the cursor, says where the stream stands on all of them.

    Args:
        dataset: Rows by index.
        collate: From rows to a batch.
        seed: Decides the order.
        rank: Index of this process.
        world_size: Number of processes.
    """

    def __init__(self, dataset: Sequence | Dataset, collate: Collate, seed: int, rank: int, world_size: int) -> None:
        self.dataset, self.collate = dataset, collate
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.cursor = 0  # prompts taken so far by all processes together

    def take(self, n: int) -> dict[str, Any]:
        """The next n prompts of this process, as a batch. Every process must ask for as many."""
        at_least(1, n=n)
        start = self.cursor + n * self.rank
        self.cursor += n * self.world_size
        return self.collate([self.dataset[self.index(position)] for position in range(start, start + n)])

    def index(self, position: int) -> int:
        """The row at a position of the endless stream."""
        number, offset = divmod(position, len(self.dataset))
        return pass_order(self.seed, number, len(self.dataset))[offset]

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands."""
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.cursor = state["cursor"]


@lru_cache(maxsize=4)
def pass_order(seed: int, number: int, length: int) -> list[int]:
    """The order of pass `number` over `length` rows."""
    # Not seed + number: run 1 would start where run 0 goes on. A generator's first draw scatters neighbouring seeds.
    scattered = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))
    return torch.randperm(length, generator=torch.Generator().manual_seed(scattered + number)).tolist()


class PromptDataModule(TextDataModule):
    """Rows of prompts; the other columns travel along, for reward functions.

    A batch: `input_ids` (B, P) int64 and `attention_mask` (B, P) int64, padded on the LEFT; `prompts`, their texts;
    `columns`, a list for each other column.

    If the module under training has a method `experience_dataloader`, the training loader is what that returns, given
    `self.prompts` (a `PromptStream`, whose place in the data is saved in checkpoints); any other module gets batches.

    Args:
        data: Training data: a hub id, a .jsonl, .json, .csv or .parquet file, a folder of those, `vader:NAME` or a
            datasets object; see `TextDataModule`.
        prompt_column: Column of prompts, as text or chat messages; None looks for prompt, input, query, question,
            instruction.
        text_column: Column of texts whose openings are the prompts, with `opening_tokens`; None looks for text.
        opening_tokens: Take so many first tokens of each text as the prompt, for the model to go on from. Texts that
            have no more than these are left out. None uses the prompt column.
        max_prompt_length: Most tokens of a prompt.
        long_prompts: What to do with longer ones: truncate (keeps the end of the prompt), drop or error.
        **kwargs: The other arguments of `TextDataModule`, without `max_length`.
    """

    def __init__(
        self,
        data: Source,
        prompt_column: str | None = None,
        text_column: str | None = None,
        opening_tokens: int | None = None,
        max_prompt_length: int = 512,
        long_prompts: Literal["truncate", "drop", "error"] = "truncate",
        **kwargs: Any,
    ) -> None:
        at_least(1, max_prompt_length=max_prompt_length, opening_tokens=opening_tokens)
        super().__init__(data, max_length=max_prompt_length, **kwargs)
        if opening_tokens is not None and opening_tokens > max_prompt_length:
            raise ValueError(f"`opening_tokens`={opening_tokens} exceeds `max_prompt_length`={max_prompt_length}")
        if long_prompts not in ("truncate", "drop", "error"):
            raise ValueError(f"`long_prompts` must be truncate, drop or error, not {long_prompts!r}")
        if opening_tokens is None and text_column is not None:
            raise ValueError("`text_column` has no effect without `opening_tokens`; give that, or `prompt_column`")
        if opening_tokens is not None and prompt_column is not None:
            raise ValueError("`prompt_column` has no effect with `opening_tokens`; give one of them, or `text_column`")
        self.prompt_column, self.text_column = prompt_column, text_column
        self.opening_tokens, self.long_prompts = opening_tokens, long_prompts
        self._stream: PromptStream | None = None
        self._cursor = {"cursor": 0}  # of a checkpoint, until there is a stream

    def select(self, dataset: Dataset, where: str) -> Dataset:
        if self.opening_tokens is not None:
            return dataset.rename_column(find_column(dataset, "text", self.text_column, where), _PROMPT)
        column = find_column(dataset, "prompt", self.prompt_column, where, "text" not in dataset.column_names)
        if column is None:
            raise ValueError(f"{where}: no prompt column but text; give `opening_tokens` or `prompt_column`")
        return dataset.rename_column(column, _PROMPT)

    def check_row(self, row: dict[str, Any]) -> None:
        check = check_text if self.opening_tokens is None else check_string
        check(row[_PROMPT], "the prompt" if self.opening_tokens is None else "text")

    def identity(self, row: dict[str, Any]) -> Any:
        return row[_PROMPT]

    def measure(self, row: dict[str, Any]) -> Fate:
        if self.opening_tokens is not None:
            ids = encode_prompt(self.tokenizer, row[_PROMPT])
            return Fate(cut=False, kept=len(ids) > len(opening(self.tokenizer, ids, self.opening_tokens)))
        rendered = render_prompt(self.tokenizer, row[_PROMPT])
        if surely_fits(rendered.prompt, self.max_length):
            return Fate(cut=False, kept=True)
        length = len(encode_prompt(self.tokenizer, rendered.prompt, rendered.templated))
        if length > self.max_length and self.long_prompts == "error":
            raise ValueError(
                f"the prompt {rendered.prompt[:60]!r}... has {length} tokens, more than `max_prompt_length`="
                f"{self.max_length}; raise that, or set `long_prompts` to truncate or drop"
            )
        long = length > self.max_length
        return Fate(cut=long, kept=not long or self.long_prompts == "truncate")

    def report(self, cut: int, dropped: int, total: int) -> None:
        if self.opening_tokens is not None and dropped:
            rank_zero_info(
                f"{dropped} of {total} texts have no more than `opening_tokens`={self.opening_tokens} tokens, "
                "and are left out"
            )
        elif cut:
            done = "left out" if dropped else "cut to their end"
            rank_zero_warn(
                f"{cut} of {total} prompts have more than `max_prompt_length`={self.max_length} tokens and are {done} "
                "(`long_prompts`)"
            )

    def collate_function(self) -> Collate:
        return partial(
            collate, tokenizer=self.tokenizer, max_prompt_length=self.max_length, opening_tokens=self.opening_tokens
        )

    @property
    def prompts(self) -> PromptStream:
        """The training prompts as an endless stream; after `setup`."""
        if self._stream is None:
            world_size, rank = self.placement()
            self._stream = PromptStream(self.ready("train"), self.collate_function(), self.seed, rank, world_size)
            self._stream.load_state_dict(self._cursor)
        return self._stream

    def train_dataloader(self) -> Any:
        """What an on-policy module makes of the prompts, or batches of them."""
        take_over = getattr(getattr(self.trainer, "lightning_module", None), "experience_dataloader", None)
        return super().train_dataloader() if take_over is None else take_over(self.prompts)

    def state_dict(self) -> dict[str, int]:
        """The stream's place in the data, for the checkpoint."""
        return self._cursor if self._stream is None else self._stream.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a checkpoint; also before `setup`."""
        self._cursor = dict(state_dict)
        if self._stream is not None:
            self._stream.load_state_dict(state_dict)


def opening(tokenizer: PreTrainedTokenizerBase, ids: list[int], count: int) -> list[int]:
    """The first `count` tokens of a text's ids, not counting a BOS before them."""
    has_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return ids[: count + has_bos]


def collate(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_prompt_length: int, opening_tokens: int | None
) -> dict[str, Any]:
    """Rows to a batch; see `PromptDataModule`."""
    ids, prompts = [], []
    for row in rows:
        if opening_tokens is not None:
            ids.append(opening(tokenizer, encode_prompt(tokenizer, row[_PROMPT]), opening_tokens))
            prompts.append(tokenizer.decode(ids[-1], skip_special_tokens=True, clean_up_tokenization_spaces=False))
            continue
        rendered = render_prompt(tokenizer, row[_PROMPT])
        whole = encode_prompt(tokenizer, rendered.prompt, rendered.templated)
        ids.append(whole[-max_prompt_length:])
        fits = len(whole) <= max_prompt_length
        prompts.append(rendered.prompt if fits else tokenizer.decode(ids[-1], clean_up_tokenization_spaces=False))
    return {
        "input_ids": pad(ids, "left", pad_id(tokenizer)),
        "attention_mask": padding_mask(ids, "left").long(),
        "prompts": prompts,
        "columns": {name: [row[name] for row in rows] for name in rows[0] if name != _PROMPT},
    }
