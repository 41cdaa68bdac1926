"""Weights in 4 bits, under LoRA adapters (QLoRA): what is asked of bitsandbytes, and what is refused without it."""

import importlib.util
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import BitsAndBytesConfig

HEADS = ["lm_head", "score"]
"""Layers that keep their digits, whatever their place in a model: the language-model head and the scalar head."""


def check_4bit(lora_r: int, device: torch.device, mesh: DeviceMesh | None) -> None:
    """ValueError if `load_in_4bit` cannot work in a run.

    Args:
        lora_r: rank of the adapters.
        device: where the run trains.
        mesh: ranks over which weights are to be sharded.
    """
    if not lora_r:
        raise ValueError(
            "`load_in_4bit` must be False where `lora_r` is 0: weights of 4 bits are not trained. Give the adapters "
            "that are, such as `lora_r=16`."
        )
    if mesh is not None:
        raise ValueError(
            "`load_in_4bit` must be False under `--trainer.strategy fsdp2`, which cannot shard packed weights. Use "
            "`ddp`, where every GPU has the whole model in 4 bits."
        )
    if device.type != "cuda":
        raise ValueError(
            f"`load_in_4bit` must be False on a device of type `{device.type}`: it needs an NVIDIA GPU. Set "
            "`--trainer.accelerator gpu`, or leave the flag out and set `dtype=bfloat16`."
        )
    check_available()


def check_available() -> None:
    """ValueError if this machine cannot hold weights in 4 bits."""
    if not torch.cuda.is_available():
        raise ValueError(
            "`load_in_4bit` must be False on a machine without an NVIDIA GPU that this build of torch can use "
            "(`torch.cuda.is_available()` is False). Leave the flag out; `dtype=bfloat16` halves the memory, too."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("`load_in_4bit` needs the package bitsandbytes: `pip install bitsandbytes`.")


def in_4bit(compute_dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` for weights in 4-bit NormalFloat, their scales quantised too.

    Source: Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314; the work is bitsandbytes'.
    """
    check_available()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=HEADS,  # the name is of 8 bits, the effect is not
    )
    return {"quantization_config": config}


def is_4bit(model: nn.Module) -> bool:
    """Whether a Hugging Face model, with or without adapters, has its weights in 4 bits."""
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(whole, "is_loaded_in_4bit", False)
