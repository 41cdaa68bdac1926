"""A checkpoint's model as a Hugging Face folder.

    python train.py export --ckpt_path runs/x/checkpoints/last.ckpt --folder model
    python train.py export --ckpt_path runs/x/checkpoints/last.ckpt --folder adapter --lora adapter
    python train.py export --ckpt_path runs/x/checkpoints/last.ckpt --folder model --push_to_hub owner/name

Only the network that is exported is built: no value model, no reward, no data.
"""

import inspect
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from . import modules
from .checkpointing import TENSORS, beside, load_folder
from .hub import check_push, push
from .model_card import CARD, MARK, CardFacts, write_card
from .modules import TextModule
from .modules.checks import require
from .modules.exporting import ADAPTER, WHOLE, remove
from .modules.scorer import Scorer
from .pretrained import resolve

RUN = "run.json"  # what the Provenance callback leaves in a run's folder
TOKENIZER = (
    "tokenizer*",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)


def export(
    ckpt_path: str,
    folder: str,
    lora: Literal["merged", "adapter"] = "merged",
    model: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool = True,
    license: str | None = None,
) -> None:
    """Write a checkpoint's model as a Hugging Face folder: weights, config, tokenizer and model card.

    A reward model's normaliser goes along. The folder is written whole or not at all.

    Args:
        ckpt_path: a checkpoint of one of this package's modules: a file, or the folder of a sharded one.
        folder: where to write.
        lora: of a checkpoint with LoRA: `merged` writes a whole model, `adapter` only the adapter, for peft.
        model: where the base model is, if it is no longer where it was in the training, or was given as an object.
        tokenizer: the same for the tokenizer; null is the checkpoint's, or else that of the model.
        overwrite: replace a model that is in the folder; other files in it stay.
        push_to_hub: upload the folder to this repository on the Hugging Face hub, `owner/name`.
        private: of a new repository on the hub.
        license: the licence that the model card states, such as `apache-2.0`; null takes that of the base model's card.
    """
    require("lora", lora in ("merged", "adapter"), "`merged` or `adapter`", lora)
    if push_to_hub is not None:
        check_push(push_to_hub)
    target, given = Path(folder).absolute(), {"model": model, "tokenizer": tokenizer}
    check_target(target, overwrite)
    checkpoint = read_checkpoint(Path(ckpt_path))
    hyperparameters = checkpoint.get("hyper_parameters", {}) | {k: v for k, v in given.items() if v is not None}
    module = rebuild(checkpoint, hyperparameters)
    if Path(resolve(module.hparams.model)).resolve() == target.resolve():
        raise ValueError(f"`--folder`: the base model itself is in `{folder}`; name another folder.")
    if lora == "adapter" and not module.hparams.lora_r:
        raise ValueError("`--lora adapter`: the checkpoint holds all weights and no adapter; leave the flag out.")
    if lora == "merged" and hyperparameters.get("load_in_4bit"):
        raise ValueError("`--lora merged`: it was trained beside weights of 4 bits. Give `--lora adapter`.")
    network = load_network(module)
    restore(module, network, checkpoint)
    partial = beside(target, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        module.save_pretrained(partial, merge=lora == "merged")
        facts = card_facts(Path(ckpt_path), checkpoint, hyperparameters)
        name = (push_to_hub or target.name).rpartition("/")[2]
        write_card(partial, facts._replace(name=name, adapter=lora == "adapter", license=license, repo=push_to_hub))
        put_into_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if push_to_hub is not None:
        push(folder, push_to_hub, private)


def card_facts(path: Path, checkpoint: dict[str, Any], hyperparameters: dict[str, Any]) -> CardFacts:
    """What the model card can say: from the checkpoint, and from the run's folder if it still lies there."""
    roots = [parent for parent in list(path.resolve().parents)[:2] if (parent / RUN).is_file()]
    run = json.loads((roots[0] / RUN).read_text(encoding="utf-8")) if roots else {}
    config = roots[0] / "config.yaml" if roots else None
    measured = checkpoint.get("measured", {})
    return CardFacts(
        name=path.name,
        module=checkpoint["module_class"],
        settings=hyperparameters,
        run=run,
        metrics=measured.get("metrics", {}),
        before=measured.get("before", {}),
        which=f"It is the model at optimizer step {checkpoint['global_step']}.",
        config=config.read_text(encoding="utf-8") if config is not None and config.is_file() else "",
    )


def check_target(folder: Path, overwrite: bool) -> None:
    """ValueError if something is in the folder that must not be replaced."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--folder`: `{folder}` is a file.")
    if not overwrite and folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"`--folder`: `{folder}` is not empty. Name another folder, or replace the model in it with "
            "`--overwrite true`."
        )


def put_into_place(new: Path, folder: Path) -> None:
    """Give a written folder its name; in an existing one its files replace those of a model."""
    if not folder.exists():
        new.rename(folder)
        return
    remove(folder, WHOLE + ADAPTER + TOKENIZER)
    card = folder / CARD
    if card.exists() and MARK not in card.read_text(encoding="utf-8"):
        (new / CARD).unlink()  # somebody's own
    for file in new.iterdir():
        file.replace(folder / file.name)


# --- reading --------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint without its optimizer states, for which there may be no memory: those of a file stay on the disk."""
    if path.is_dir():
        return load_folder(path, only=f"{TENSORS}.")
    if not path.exists():
        raise ValueError(f"`--ckpt_path`: there is no checkpoint `{path}`.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"`--ckpt_path`: `{path}` cannot be read as a checkpoint: {reason}") from error


# --- building -------------------------------------------------------------------------------------------------------


def rebuild(checkpoint: dict[str, Any], hyperparameters: dict[str, Any]) -> TextModule:
    """The module that wrote the checkpoint, with the hyperparameters that concern the exported network."""
    known = {name: getattr(modules, name) for name in modules.__all__ if name != "TextModule"}
    name = checkpoint.get("module_class", "another library")
    if name not in known:
        raise ValueError(
            f"The checkpoint was written by {name}; known here are {', '.join(known)}. A module of your own is "
            f"exported in Python: `{name}.load_from_checkpoint(ckpt_path, weights_only=True).save_pretrained(folder)`."
        )
    if "model" not in hyperparameters:
        raise ValueError("`--model`: the checkpoint does not say what its base model is; it was given as an object.")
    hyperparameters |= {"dtype": checkpoint.get("dtype", hyperparameters["dtype"])}  # `precision` may have ruled
    # Bits are a matter of training: here the adapter alone matters, and there may be no GPU.
    needed = inspect.signature(TextModule).parameters.keys() & hyperparameters.keys() - {"load_in_4bit"}
    return known[name](**{name: hyperparameters[name] for name in needed})


def load_network(module: TextModule) -> nn.Module:
    """The network as it was before training, and the tokenizer."""
    with named("tokenizer" if module.hparams.get("tokenizer") else "model"):
        _ = module.tokenizer  # now: it is loaded when it is first needed
    with named("model"):
        return module.load_network()


@contextmanager
def named(flag: str) -> Iterator[None]:
    """Let an error say with which flag another place is given."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The {flag} of the checkpoint cannot be loaded: {error} If it is elsewhere now, say where with `--{flag}`."
        ) from error


def restore(module: TextModule, network: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Give the module its network with the checkpoint's tensors, and a reward model its normaliser."""
    setattr(module, module.exported, network)
    saved = {name: t for name, t in checkpoint[TENSORS].items() if name.startswith(f"{module.exported}.")}
    trained = {name: module.get_parameter(name).shape for name in module.trained_names()}
    sizes = {name: tensor.shape for name, tensor in saved.items()}
    differing = sorted(name for name in trained.keys() | sizes.keys() if trained.get(name) != sizes.get(name))
    if differing:
        raise ValueError(
            f"The checkpoint does not fit the model `{module.hparams.model}`: {len(differing)} tensors are in only one "
            f"of both, or of another size, such as `{differing[0]}`. With `--model`, give what the training started "
            "from."
        )
    module.load_state_dict(saved, strict=False, assign=True)  # no second copy in memory
    for part in network.modules():
        if isinstance(part, PreTrainedModel):
            part.tie_weights()
    if isinstance(network, Scorer):
        module.take_over(checkpoint)
