"""From the text of a row to token ids: render, tokenise, mask, truncate, pad.

Text is a string, or a list of chat messages (`[{"role": "user", "content": "..."}]`) that goes through the tokenizer's
chat template. Two rules hold everywhere:

1. Prompt and completion are tokenised apart and joined. Tokenised as one string, the last characters of the prompt may
   merge with the first of the completion into one token; but generation starts after the prompt's own tokens, so
   that is where the seam must be in training too.
2. Padding is known by lengths, never by comparing with the pad id: pad == eos is safe.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
Text = str | Messages

_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
_SPECIAL_TOKENS = 8  # more than any tokenizer adds by itself


class Rendered(NamedTuple):
    """Text ready for the tokenizer. `templated`: the chat template wrote it, special tokens included."""

    prompt: str
    completion: str
    templated: bool


class Encoded(NamedTuple):
    """Token ids, and which of them are targets: those of the completion that have a token before them."""

    ids: list[int]
    loss_mask: list[bool]


def check_text(value: Any, column: str, allow_empty: bool = False) -> Text:
    """Return `value` if it is non-empty text or a list of messages, else raise."""
    if isinstance(value, list):
        as_messages(value, column)
    elif not isinstance(value, str):
        raise ValueError(f"{column} must be text or a list of messages, not {value!r}")
    if not allow_empty and not (value.strip() if isinstance(value, str) else value):
        raise ValueError(f"{column} is empty; fill it in or delete the row")
    return value


def check_string(value: Any, column: str) -> str:
    """Return `value` if it is a non-empty string, else raise."""
    if not isinstance(value, str):
        raise ValueError(f"{column} must be text, not {value!r}")
    check_text(value, column)
    return value


def as_messages(value: Any, column: str = "messages") -> Messages:
    """Messages with `role` and `content`: ShareGPT's `from` and `value` renamed, fields that are None dropped."""
    if not isinstance(value, list):
        raise ValueError(f"{column} must be a list of messages, not {value!r}")
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise ValueError(f"{column}: each message must be an object with role and content, not {message!r}")
        if message.get("role") is None and message.get("from") is not None:
            message = {"role": _ROLES.get(message["from"], message["from"]), "content": message.get("value")}
        # A table has every field in every row; templates ask whether a field is there, not whether it is None.
        message = {key: field for key, field in message.items() if field is not None}
        if "role" not in message or "content" not in message:
            raise ValueError(f"{column}: a message needs role and content, found {message!r}")
        messages.append(message)
    return messages


def split_messages(messages: list) -> tuple[Messages, Messages]:
    """(everything before the last assistant turn, that turn). What follows it is left out."""
    messages = as_messages(messages)
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if last == 0:
        raise ValueError("messages needs an assistant turn with another turn before it, to learn the answer from")
    return messages[:last], messages[last : last + 1]


def split_pair(prompt: Text | None, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) of a pair; without a prompt it is what chosen and rejected begin with in common.

    A prompt of strings ends at the end of a word (the space belongs to the completions, as tokenizers have it). A text
    prompt beside chosen and rejected messages repeats their first turn, and is not used.
    """
    if prompt is not None and isinstance(prompt, str) == isinstance(chosen, str):
        return prompt, chosen, rejected
    if not isinstance(chosen, str):
        chosen, rejected = as_messages(chosen), as_messages(rejected)
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    if isinstance(chosen, str):
        while shared and not chosen[shared - 1].isspace():
            shared -= 1
        shared = len(chosen[:shared].rstrip())
    return chosen[:shared], chosen[shared:], rejected[shared:]


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: list, start_answer: bool) -> str:
    """The messages as text by the tokenizer's chat template; `start_answer` opens the assistant's turn at the end."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"the data holds chat messages but the tokenizer {tokenizer.name_or_path or ''!r} has no chat template; "
            "use an instruction-tuned model's tokenizer, or columns of plain text"
        )
    try:
        text = tokenizer.apply_chat_template(as_messages(messages), tokenize=False, add_generation_prompt=start_answer)
        return str(text)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses the messages {str(messages)[:200]}: {error}") from None


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> Rendered:
    """A prompt as the model sees it before it answers."""
    if isinstance(prompt, str):
        return Rendered(prompt, "", templated=False)
    return Rendered(apply_template(tokenizer, prompt, start_answer=True), "", templated=True)


def render(tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text) -> Rendered:
    """Prompt and completion as text: strings as they are, messages by the chat template.

    The completion is what the template writes after the rendered prompt, up to its EOS token if it writes one.
    (Some templates open the answer in the prompt otherwise than in a finished chat; then the seam is where they part.)
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return Rendered(prompt, completion, templated=False)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError("prompt and completion must both be text or both be lists of messages")
    opening = apply_template(tokenizer, prompt, start_answer=True)
    whole = apply_template(tokenizer, [*prompt, *completion], start_answer=False)
    seam = next((i for i, (a, b) in enumerate(zip(opening, whole, strict=False)) if a != b), len(opening))
    answer = whole[seam:]
    if tokenizer.eos_token and answer.rstrip().endswith(tokenizer.eos_token):
        answer = answer.rstrip()  # what follows EOS, often a line break, is never generated
    return Rendered(whole[:seam], answer, templated=True)


def surely_fits(text: str, max_length: int) -> bool:
    """Whether a text cannot have more than `max_length` tokens: a token covers at least one byte."""
    return len(text.encode()) + _SPECIAL_TOKENS <= max_length


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, templated: bool = False) -> list[int]:
    """Ids of a prompt: with the BOS that the tokenizer adds by default (a template writes its own), without an EOS."""
    # verbose=False: no remark about the model's own length limit; ours is applied after this
    ids = list(tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if not templated and eos is not None and ids[-1:] == [eos] and not text.endswith(tokenizer.eos_token):
        ids.pop()  # some tokenizers end every text with EOS; a prompt goes on
    return ids


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None, append_eos: bool, templated: bool = False
) -> Encoded:
    """Plain text. Every token but the first, which nothing comes before, is a target."""
    ids = end(tokenizer, encode_prompt(tokenizer, text, templated), append_eos)[:max_length]
    return Encoded(ids, [i > 0 for i in range(len(ids))])


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, max_length: int | None, append_eos: bool
) -> Encoded:
    """Prompt and completion, tokenised apart (see the head of this file), cut at `max_length` from the right.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompt: Text or messages; not a target.
        completion: Text or messages; its tokens and the EOS are targets.
        max_length: Tokens to keep; None keeps all. The EOS goes first.
        append_eos: End with EOS, unless the completion does already.

    Returns:
        Ids and loss mask, of one length.
    """
    rendered = render(tokenizer, prompt, completion)
    before = encode_prompt(tokenizer, rendered.prompt, rendered.templated)
    after = list(tokenizer(rendered.completion, add_special_tokens=False, verbose=False)["input_ids"])
    ids = (before + end(tokenizer, after, append_eos))[:max_length]
    return Encoded(ids, [i >= max(len(before), 1) for i in range(len(ids))])


def end(tokenizer: PreTrainedTokenizerBase, ids: list[int], append_eos: bool) -> list[int]:
    """Add the EOS id, unless the ids end with it already."""
    if append_eos and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token to end a text with; set one on the tokenizer")
    return [*ids, tokenizer.eos_token_id] if append_eos and ids[-1:] != [tokenizer.eos_token_id] else ids


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What to write into padding; any id will do, since masks come from lengths."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


def pad(sequences: Sequence[Sequence], side: Literal["left", "right"], value: bool | int | float) -> Tensor:
    """Sequences as one tensor, filled up with `value`, whose type sets the dtype: bool, int64 or float32."""
    dtype = {bool: torch.bool, int: torch.long, float: torch.float32}[type(value)]
    longest = max(map(len, sequences))
    padded = torch.full((len(sequences), longest), value, dtype=dtype)
    for row, sequence in zip(padded, sequences, strict=True):
        start = longest - len(sequence) if side == "left" else 0
        row[start : start + len(sequence)] = torch.tensor(sequence, dtype=dtype)
    return padded


def padding_mask(sequences: Sequence[Sequence], side: Literal["left", "right"]) -> Tensor:
    """True where `pad` puts a sequence's own values, False where it fills up."""
    return pad([[True] * len(sequence) for sequence in sequences], side, False)


def as_number(value: Any, column: str) -> float:
    """A finite number, also from the text of a CSV file."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{column} must be a finite number, not {value!r}")
    return number
