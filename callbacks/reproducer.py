"""What a step needs to be computed once more, in a folder that `torch.load(weights_only=True)` can read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

WEIGHTS = "weights.pt"
Plain = str | int | float | bool | None
_NEWEST = ("last_model_path", "_last_checkpoint_saved")  # attributes of a ModelCheckpoint


@dataclass
class Reproducer:
    """One rank's part of an optimizer step that went wrong.

    `found = load_reproducer(folder)`, then build the module from `found.hparams`, load `found.weights` into it, set the
    generators with `restore_state(found.rng[i])`, and call `training_step` with `found.batches[i]`.
    """

    module_class: str
    """Dotted path of the module's class."""
    hparams: dict[str, Any]
    """Its constructor's arguments; those that are no plain values as text."""
    batches: list[Any]
    """The micro-batches of the step, on the CPU; a NamedTuple comes back as a dict of its fields."""
    losses: list[float]
    """One for each micro-batch, as it went into the backward pass."""
    rng: list[dict[str, Any]]
    """States of the generators before each micro-batch, as `rng_state.restore_state` takes them."""
    gradients: list[str]
    """Names of parameters whose gradient is not finite."""
    rank: int
    iteration: int
    step: int
    """Finished optimizer steps."""
    precision: str
    checkpoint: str
    """The last checkpoint before it; empty if there is none."""
    weights: dict[str, Tensor]
    """What is trained, before the step; the rest is the module's own `model`. Empty if they could not be written."""


def save_reproducer(folder: Path, found: Reproducer) -> None:
    """Write one rank's part; rank zero writes the weights, too.

    Raises:
        OSError: if that is not possible; also where torch has another error for it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(vars(found) | {"weights": {}}, folder / f"rank_{found.rank}.pt")
        if found.rank == 0:
            torch.save(found.weights, folder / WEIGHTS)
    except RuntimeError as error:  # torch's own writer, when the disk is full
        raise OSError(str(error)) from error


def load_reproducer(folder: str | Path, rank: int = 0) -> Reproducer:
    """Read what `NonFiniteAlarm` has left in `<run>/nonfinite`.

    Args:
        folder: where it is.
        rank: whose micro-batches and generators.

    Raises:
        ValueError: if there is none of this rank.
    """
    folder = Path(folder)
    path = folder / f"rank_{rank}.pt"
    if not path.exists():
        there = sorted(p.name for p in folder.glob("rank_*.pt"))
        raise ValueError(f"`folder` must hold {path.name}, but {folder} has {there or 'no reproducer'}.")
    fields = torch.load(path, map_location="cpu", weights_only=True)
    weights = folder / WEIGHTS
    fields["weights"] = torch.load(weights, map_location="cpu", weights_only=True) if weights.exists() else {}
    return Reproducer(**fields)


def trained_weights(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """What is trained, whole and on the CPU. With sharded weights all ranks must call it; those keep nothing of it."""
    weights = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if keep:
                weights[name] = value.cpu()
    return weights


def last_checkpoint(trainer: L.Trainer) -> str:
    """The path of the newest checkpoint of the run, as far as its callbacks know."""
    paths = [getattr(keeper, name, "") for keeper in trainer.checkpoint_callbacks for name in _NEWEST]
    return next((str(path) for path in paths if path), str(trainer.ckpt_path or ""))


def plain(value: Any) -> Any:
    """Tensors on the CPU, numbers, strings, and lists and dicts of these; anything else as its text."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Plain):
        return value
    if isinstance(value, Mapping):
        return {key if isinstance(key, Plain) else str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, list | tuple | range):
        return [plain(item) for item in value]
    return repr(value)
