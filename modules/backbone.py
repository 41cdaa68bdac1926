"""Language models as they are loaded: from which place, in which dtype, with which adapters."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME

from ..pretrained import load_config, resolve
from .quantization import in_4bit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NORMALIZER = "reward_normalizer.json"
"""In an adapter's folder, which has no config.json: with one, transformers would look for the whole model there."""


def load_causal_lm(
    spec: str | PreTrainedModel, dtype: str, trust_remote_code: bool = False, load_in_4bit: bool = False
) -> PreTrainedModel:
    """The causal language model of a spec (see `lightning_rlhf.pretrained`), dropout off, in `dtype`.

    Of a peft adapter's folder it is the base model with the adapter merged into it. Under `torch.device("meta")` it is
    the model's shape without weights. With `load_in_4bit` the weights of linear layers have 4 bits, the others `dtype`.
    """
    quantized = quantization(spec, dtype, load_in_4bit)
    if base := adapter_base(spec):
        return with_adapter(load_causal_lm(base, dtype, trust_remote_code), spec)
    if torch.get_default_device().type == "meta":
        config = spec.config if isinstance(spec, PreTrainedModel) else load_config(spec, trust_remote_code)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
    elif isinstance(spec, PreTrainedModel):
        model = narrowed(spec, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            resolve(spec),
            config=load_config(spec, trust_remote_code),
            dtype=DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            **quantized,
        )
    model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    return model


def _contiguous(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Input of a language-model head, in one piece.

    `logits_to_keep` hands the head a view of the last positions. For a view times a frozen weight, torch.matmul chooses
    a batched product and copies the (V, H) weight once per sequence: gigabytes, and most of a rollout's time.
    """
    return (args[0].contiguous(),)


def narrowed(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The model with its parameters in `dtype`, in place; packed ones stay, and so do buffers.

    Buffers hold the frequencies of rotary positions, whose rounding errors would be multiplied by the position.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(DTYPES[dtype])
    return model


def quantization(spec: str | PreTrainedModel, dtype: str, load_in_4bit: bool) -> dict[str, Any]:
    """Further arguments of `from_pretrained`."""
    if not load_in_4bit:
        return {}
    if isinstance(spec, PreTrainedModel) or adapter_base(spec):
        what = "a model object" if isinstance(spec, PreTrainedModel) else f"the adapter `{spec}`"
        raise ValueError(
            f"`load_in_4bit` reads a whole model's folder or hub id, but got {what}. Save it first as a whole model: "
            "`save_pretrained`, or for a checkpoint `train.py export` with `--lora merged`."
        )
    return in_4bit(DTYPES[dtype])


def adapter_base(spec: str | PreTrainedModel) -> str | None:
    """Where the base model of a peft adapter's folder is; None for any other spec."""
    if (
        isinstance(spec, PreTrainedModel)
        or not Path(spec, ADAPTER_CONFIG).is_file()
        or Path(spec, CONFIG_NAME).exists()
    ):
        return None
    base = PeftConfig.from_pretrained(spec).base_model_name_or_path
    if base is None or (Path(base).is_absolute() and not Path(base).exists()):
        raise ValueError(
            f"`{spec}` is an adapter, but its base model is not at `{base}`: set `base_model_name_or_path` in its "
            f"{ADAPTER_CONFIG} to the place where that is."
        )
    return base


def with_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The model with a peft adapter merged into its weights; a model without weights as it is."""
    if model.device.type == "meta":
        return model
    config = PeftConfig.from_pretrained(folder)
    config.task_type = None  # peft's class for language models fits no scorer, which may start from one's adapter
    adapted = PeftModel.from_pretrained(model, folder, config=config, torch_device=str(model.device))
    return adapted.merge_and_unload().requires_grad_(True)


def attach_adapter(model: PreTrainedModel, folder: str) -> PeftModel:
    """The model frozen, with the LoRA layers of a peft adapter's folder beside its weights, and they are trainable.

    A scalar head is trained whole, and starts as the folder's. Of a model without weights this is the shape.
    """
    config = PeftConfig.from_pretrained(folder)
    # Without `modules_to_save` peft leaves the head where it is, instead of putting a copy beside it.
    config.task_type, config.modules_to_save, config.inference_mode, config.lora_dropout = None, None, False, 0.0
    adapted = PeftModel(model, config)
    if model.device.type != "meta":
        found = set_peft_model_state_dict(adapted, load_peft_weights(folder, device=str(model.device)))
        strange = [*found.unexpected_keys, *(name for name in found.missing_keys if "lora_" in name)]
        if strange:
            raise ValueError(f"The adapter `{folder}` does not fit its base model, see `{strange[0]}`.")
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    return adapted


def add_lora(
    model: PreTrainedModel, r: int, alpha: int, target_modules: str | list[str], last_layers: int | None = None
) -> PeftModel:
    """`model` frozen, with trainable LoRA adapters (float32 whatever the model's dtype).

    With `last_layers` only the last so many layers get adapters; the backward pass then stops there.

    Source: Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685; the work is peft's.
    """
    has_head = hasattr(model, "score")  # a scalar head is trained whole
    layers = model.config.get_text_config().num_hidden_layers
    if last_layers is not None and not 1 <= last_layers <= layers:
        raise ValueError(
            f"`lora_last_layers` must be between 1 and the model's {layers} layers, but got {last_layers}."
        )
    if target_modules == "all-linear":
        linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        linear -= {"lm_head", "score"}
        if not linear:
            raise ValueError(
                f"`lora_r` must be 0 for a model of type `{model.config.model_type}`, which has no linear layers that "
                f"adapters could go with, but got {r}."
            )
        if last_layers is not None:  # peft takes layers only with names
            target_modules = sorted(linear)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=target_modules,
        exclude_modules=["score"] if has_head else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        layers_to_transform=None if last_layers is None else list(range(layers - last_layers, layers)),
    )
    adapted = get_peft_model(model, config)
    if has_head:
        model.score.requires_grad_(True)
    return adapted


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The Hugging Face model itself; LoRA layers stay inside it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
