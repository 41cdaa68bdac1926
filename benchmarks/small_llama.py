"""A Llama of any shape with random weights, a reward model beside it, and prompts: what `scaling.py` trains."""

from pathlib import Path

import torch
from datasets import Dataset
from model_shapes import Run, Shape
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from lightning_rlhf.datamodules import PromptDataModule, SFTDataModule
from lightning_rlhf.modules import PPOModule, SFTModule

EOS = 0


def llama_config(shape: Shape) -> LlamaConfig:
    """The shape in Hugging Face's terms."""
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
        num_labels=1,
    )


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per word, and the words are w1, w2 and so on."""
    words = {"<eos>": EOS} | {f"w{i}": i for i in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def write_models(shape: Shape, folder: Path) -> None:
    """Folders `policy` and `reward`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(llama_config(shape)).save_pretrained(folder / "policy")
        LlamaForSequenceClassification(llama_config(shape)).save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        make_tokenizer(shape.vocabulary).save_pretrained(folder / name)


def make_texts(shape: Shape, count: int, length: int) -> list[str]:
    """Every other text is one word shorter, so that most batches have padding, as real ones have."""
    ids = torch.randint(1, shape.vocabulary, (count, length), generator=torch.Generator().manual_seed(1)).tolist()
    return [" ".join(f"w{i}" for i in row[: length - number % 2]) for number, row in enumerate(ids)]


def make_module(run: Run, folder: Path, plain: bool = True) -> PPOModule | SFTModule:
    """The module of a run, one pass over each rollout; by the plain paths, for those are what the formulas are of."""
    names = ("dtype", "lora_r", "lora_last_layers", "gradient_checkpointing")
    options = {name: getattr(run, name) for name in names} | {"lr_scheduler": "constant"}
    if plain:
        options |= dict.fromkeys(("padding_free", "fused_logprobs", "fused_layers", "fused_optimizer"), False)
    if run.method == "sft":
        return SFTModule(str(folder / "policy"), **options)
    return PPOModule(
        str(folder / "policy"),
        str(folder / "reward") if run.reward_model else _nothing,
        value_model=str(folder / "reward") if run.value == "network" else None,
        rollout_batch_size=run.rollout_batch_size,
        minibatch_size=run.batch,
        num_passes=1,
        max_new_tokens=run.response,
        forward_batch_size=run.forward_batch_size,
        compact_rollouts=not plain,
        packed_weights=not plain,
        **options,
    )


def _nothing(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    return [0.0] * len(responses)


def make_data(run: Run, steps: int) -> PromptDataModule | SFTDataModule:
    """Prompts of P words, or texts of L − 1 words (an EOS follows) for so many steps."""
    if run.method == "sft":
        texts = make_texts(run.shape, steps * run.batch * run.ranks, run.length - 1)
        return SFTDataModule(Dataset.from_dict({"text": texts}), batch_size=run.batch)
    prompts = make_texts(run.shape, 4 * run.rollout_batch_size * run.ranks, run.prompt)
    return PromptDataModule(Dataset.from_dict({"prompt": prompts}))
