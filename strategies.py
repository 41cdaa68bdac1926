"""`--trainer.strategy fsdp2`: weights, gradients and optimizer states sharded over all ranks (ZeRO-3).

Importing this module (or `lightning_rlhf.modules`) makes the name known to Lightning.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from .checkpointing import assemble, save_folder, saved_tensors


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with all ranks in one data-parallel group, and checkpoints that fit each other.

    Each rank computes the gradient of its own data; g = 1/M Σ g_m is reduced to shards, of which each rank updates one.
    Checkpoints hold what is trained and no frozen network, and may be resumed on any number of ranks, under this or any
    other strategy. It runs on CPUs (gloo) and GPUs (NCCL).

    Args:
        save_distributed_checkpoint: True writes a folder, each rank its shard; False gathers one file on rank 0, which
            then needs memory for all that is trained and its optimizer states.
        unshard_rollouts: gather the policy once per rollout, if a device can hold it whole beside the KV cache; False
            gathers block by block for each token.
        process_group_backend: `gloo`, `nccl`; None chooses by the device.
        timeout: of collectives.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        unshard_rollouts: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)
        self.unshard_rollouts = unshard_rollouts

    def setup_environment(self) -> None:
        """All ranks form one group ("auto" would be one per machine)."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # Where the parent loads everything at once, these load when Lightning's order asks for it, as other strategies do:
    # the module sees the checkpoint first, and can refuse it.

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizer states are loaded by `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained: whole on rank 0, or this rank's shards."""
        named = self.lightning_module.named_parameters(remove_duplicate=False)
        return {name: self._for_file(parameter.detach()) for name, parameter in named if parameter.requires_grad}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state in torch's own format, its tensors whole on rank 0, or this rank's shards."""
        state = optimizer.state_dict()
        tensors = {
            number: {key: self._for_file(value) for key, value in values.items()}
            for number, values in state["state"].items()
        }
        return {"state": tensors, "param_groups": state["param_groups"]}

    def _for_file(self, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        if self._save_distributed_checkpoint:
            return value
        whole = value.full_tensor()
        return whole.cpu() if self.is_global_zero else None  # the others have no use for it

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """A folder with a file per rank, or one file."""
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            save_folder(checkpoint, path)
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file, whole tensors on every rank, or of a folder the shards of this rank."""
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        tensors = {
            name: self._shard_like(name, torch.Size(size), dtype) for name, (size, dtype) in saved_tensors(path).items()
        }
        dcp.load(tensors, checkpoint_id=path)
        return assemble(path, tensors, weights_only)

    def _shard_like(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """Room for this rank's part of a saved tensor: sharded along dimension 0, as parameters are."""
        if not size:
            return torch.empty(size, dtype=dtype)
        whole = torch.empty(size, dtype=dtype, device="meta")
        sharded = distribute_tensor(whole, self.device_mesh["data_parallel"], [Shard(0)], src_data_rank=None)
        return torch.empty_like(sharded, device=self.root_device)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy the checkpoint's values into this rank's shards."""
        named = dict(self.lightning_module.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in checkpoint["state_dict"].items():
                if name in named:
                    local(named[name]).copy_(local(placed_like(value, named[name])))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give the optimizers their states, each tensor placed as its parameter is."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            placed = {
                number: {key: placed_like(value, parameter) for key, value in state["state"][number].items()}
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in state["state"]
            }
            optimizer.load_state_dict({"state": placed, "param_groups": state["param_groups"]})


def placed_like(value: Any, parameter: Tensor) -> Any:
    """A state's tensor sharded as its parameter is; numbers, and tensors of another shape, as they are."""
    if isinstance(value, DTensor) or not isinstance(parameter, DTensor):
        return value
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="Fully sharded data parallel (ZeRO-3), all ranks one group"
)
