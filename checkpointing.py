"""Checkpoints that are whole or absent, in one file or, for sharded models, in a folder with a file per rank.

Both hold the same: Lightning's own dictionary, with `state_dict` and, one per optimizer, `optimizer_states` in torch's
own format (states numbered by the parameter's place in the groups). So each can be resumed under any strategy and on
any number of ranks.
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor

REST = "meta.pt"  # Lightning's name for what is not sharded
TENSORS = "state_dict"
OPTIMIZERS = "optimizer_states"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint and then renames: a process that dies while writing leaves the old one as it was.

    Lightning's own goes through a temporary folder, from where a file on another disk is copied, and through a second
    copy in memory. Remote paths (s3://, gs://) are left to it. Loading takes files, and the folders of sharded models.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a file."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = beside(path, "partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            partial.unlink()  # a disk that is full should not stay so
            raise
        take_name(partial, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file, or a folder into whole tensors."""
        if "://" not in str(path) and Path(path).is_dir():
            return load_folder(Path(path), weights_only)
        return super().load_checkpoint(path, map_location, weights_only)


def beside(path: Path, kind: str) -> Path:
    """A hidden name in the same folder, where `--ckpt_path last` does not look."""
    return path.with_name(f".{path.name}.{kind}")


def settle(checkpoint: dict[str, Any]) -> None:
    """Let Lightning's counters say whether the epoch is over: then a resumed run begins the next, else it goes on.

    As they are saved, they say neither of a checkpoint that was written behind an epoch's last batch or after the fit,
    and with `max_steps` set not even of one from the epoch's end: Lightning then leaves out batches, or the start of
    the next epoch, which is where on-policy modules sample.
    """
    fit = checkpoint.get("loops", {}).get("fit_loop")
    if fit is None:  # a checkpoint of weights only
        return
    batches, epochs = fit["epoch_loop.batch_progress"], fit["epoch_progress"]
    over, begun = batches["is_last_batch"], batches["current"]["ready"] > 0
    if not begun or epochs["current"]["started"] < epochs["current"]["ready"]:
        return
    for count in epochs.values():
        count["processed"] = count["completed"] = count["ready"] - (not over)
    total, current = batches["total"], batches["current"]
    total["started"] = total["processed"] = total["ready"]  # an epoch that was cut short left them apart
    total["completed"] = total["ready"] - (0 if over else current["ready"] - current["completed"])
    if over:
        batches["current"] = dict.fromkeys(current, 0)
        batches["is_last_batch"] = False
        # What loggers count by; it was saved before the last step was added.
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]


# --- folders --------------------------------------------------------------------------------------------------------


def save_folder(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whose tensors may be sharded; all ranks must call it.

    The folder is written under another name. Where it replaces an older one there is a moment, between two renames,
    without either; `recover` then finds the older one.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    partial = beside(path, "partial")
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    rest = dict(checkpoint)
    tensors = {TENSORS: rest.pop(TENSORS), OPTIMIZERS: {}}
    rest[OPTIMIZERS] = []
    for i, state in enumerate(checkpoint.get(OPTIMIZERS, [])):
        tensors[OPTIMIZERS][str(i)] = {str(number): values for number, values in state["state"].items()}
        rest[OPTIMIZERS].append({"state": {}, "param_groups": state["param_groups"]})
    dcp.save(tensors, checkpoint_id=partial)
    if first:
        torch.save(rest, partial / REST)
        take_name(partial, path)
    _barrier()


def take_name(new: Path, path: Path) -> None:
    """Let a written file or folder take the place of an older one."""
    if not path.is_dir() and not new.is_dir():
        new.replace(path)  # at once
        return
    old = beside(path, "old")
    remove(old)
    if path.exists():
        path.rename(old)
    new.rename(path)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def recover(folder: Path) -> None:
    """Give what a process died while replacing its name back, and remove what it left half written."""
    for old in folder.glob(".*.old"):
        path = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        remove(old) if path.exists() else old.rename(path)
    for partial in folder.glob(".*.partial"):
        remove(partial)


def load_folder(path: Path, weights_only: bool | None = True, only: str = "") -> dict[str, Any]:
    """A folder's checkpoint with whole tensors, on the CPU; each process reads for itself.

    Args:
        path: the folder.
        weights_only: of `torch.load`.
        only: read just the tensors whose names begin so, such as `state_dict.`.
    """
    sizes = {name: entry for name, entry in saved_tensors(path).items() if name.startswith(only)}
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in sizes.items()}
    with warnings.catch_warnings(action="ignore"):  # that it reads alone, as asked
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return assemble(path, tensors, weights_only)


def saved_tensors(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Sizes and types of a folder's tensors by name: `state_dict.head.weight`, `optimizer_states.0.3.exp_avg`."""
    if not (path / REST).is_file():
        raise ValueError(f"`{path}` is not a checkpoint: it is a folder without a `{REST}`.")
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}


def assemble(path: Path, tensors: dict[str, Tensor], weights_only: bool | None = True) -> dict[str, Any]:
    """Lightning's dictionary from what is beside the tensors in a folder, and the tensors by their saved names."""
    checkpoint = torch.load(path / REST, map_location="cpu", weights_only=weights_only)
    checkpoint[TENSORS] = {}
    for name, tensor in tensors.items():
        kind, _, key = name.partition(".")
        if kind == TENSORS:
            checkpoint[TENSORS][key] = tensor
        else:
            index, number, key = key.split(".")
            checkpoint[OPTIMIZERS][int(index)]["state"].setdefault(int(number), {})[key] = tensor
    return checkpoint


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
