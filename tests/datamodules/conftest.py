"""Tokenizers with ids that can be read: the id of a character is its code."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

EOS, BOS = 0, 2
# A finished turn ends with EOS and a line break, as in ChatML; "a>" opens an answer.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + '>' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a>{% endif %}"
)


def make_tokenizer(before: str = "", after: str = "") -> PreTrainedTokenizerFast:
    vocabulary = {"<eos>": EOS, "<unk>": 1, "<bos>": BOS, "\n": 10, **{chr(i): i for i in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=[("<eos>", EOS), ("<bos>", BOS)]
        )
    bos = {"bos_token": "<bos>"} if before else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>", **bos
    )


@pytest.fixture
def char_tokenizer() -> PreTrainedTokenizerFast:
    """One character, one token; pad is eos (0); a small chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Puts BOS (2) before and EOS after every text by default."""
    return make_tokenizer("<bos>", "<eos>")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(*rows: dict, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
