"""Networks as Hugging Face folders: whole models, or LoRA adapters beside their base model.

An adapter's folder is peft's own. A reward model's has its head in it, too, among peft's `modules_to_save`, and its
normaliser in a file of its own. `load_causal_lm` and `Scorer.load` read such folders.
"""

import copy
import json
from pathlib import Path

from peft import PeftModel, TaskType, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..pretrained import resolve
from .backbone import NORMALIZER, adapter_base, unwrapped
from .scorer import Scorer, merged

WHOLE = ("config.json", "generation_config.json", "model*.safetensors*")
ADAPTER = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, NORMALIZER)


def save_network(
    network: PreTrainedModel | PeftModel | Scorer, folder: str | Path, base: str | PreTrainedModel | None = None
) -> None:
    """Write a network as a folder.

    Args:
        network: a causal LM or a scorer.
        folder: where to. If a model is there, it is replaced; other files stay.
        base: None writes the whole model, adapters merged. Else only the adapters are written, and this spec says what
            they belong to.
    """
    folder = Path(folder)
    if base is None:
        merged(network).save_pretrained(folder)
        remove(folder, ADAPTER)  # or transformers would apply it to the model
        return
    place = base_place(base, folder)
    remove(folder, ADAPTER + WHOLE)  # or transformers would take the model for the adapter's base
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(network, Scorer):
        save_adapter(network.model, folder, place, TaskType.SEQ_CLS, heads=["score"])
        said = {"mean": network.mean, "std": network.std}
        if objective := getattr(unwrapped(network.model).config, "reward_objective", None):
            said["objective"] = objective
        (folder / NORMALIZER).write_text(json.dumps(said) + "\n")
    else:
        save_adapter(network, folder, place, TaskType.CAUSAL_LM)


def save_adapter(model: PeftModel, folder: Path, base: str, task: TaskType, heads: list[str] | None = None) -> None:
    """Write peft's two files.

    Args:
        model: the model with its adapter.
        folder: where to.
        base: place of the base model.
        task: for peft to know which of its classes to load.
        heads: submodules that were trained whole.
    """
    config = copy.copy(model.peft_config[model.active_adapter])
    config.base_model_name_or_path, config.task_type, config.inference_mode = base, task, True
    config.modules_to_save = heads
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)  # none was trained
    for head in heads or ():
        state = model.get_base_model().get_submodule(head).state_dict()
        tensors |= {f"base_model.model.{head}.{name}": tensor for name, tensor in state.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(folder)


def base_place(spec: str | PreTrainedModel, folder: Path) -> str:
    """The hub id or the absolute path of an adapter's base model.

    Raises:
        ValueError: when whoever loads the adapter could not find the base model there.
    """
    place = spec.name_or_path if isinstance(spec, PreTrainedModel) else resolve(spec)
    if not place:
        raise ValueError(
            "The adapter cannot be written: its base model was given as an object that comes from no folder, so nobody "
            "could find it. Give `model` as a folder, or write the merged model."
        )
    if not Path(place).exists():
        return place  # on the hub
    if adapter_base(place):
        raise ValueError(
            f"The adapter cannot be written: its base model `{place}` is itself an adapter, and peft does not stack "
            "adapter folders. Write the merged model."
        )
    if Path(place).resolve() == folder.resolve():
        raise ValueError(f"The adapter cannot be written to `{folder}`: its base model is there.")
    return str(Path(place).resolve())


def remove(folder: Path, patterns: tuple[str, ...]) -> None:
    """Delete the files in a folder whose names match."""
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()
