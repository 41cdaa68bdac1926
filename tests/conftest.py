"""A tokenizer whose ids can be read (id = ASCII code) and a two-layer Llama over it: no download, milliseconds."""

import logging
from pathlib import Path

import lightning as L
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = 0
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per ASCII character, id = its code; `<eos>` is 0 and also the pad token."""
    vocabulary = {"<eos>": EOS, **{chr(i): i for i in range(1, 128)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def make_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A small random Llama; float32."""
    config = dict(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
        initializer_range=0.3,  # far from uniform, so that differences show
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(config | changes)))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small language model, as every `model` flag takes it."""
    folder = tmp_path_factory.mktemp("tiny_model")
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_trainer(tmp_path: Path):
    """A Trainer on one CPU process that writes nothing but what a test asks for."""

    def make(**kwargs: object) -> L.Trainer:
        quiet = dict(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
        )
        return L.Trainer(**(quiet | kwargs))

    return make


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
