"""Weights spread over ranks (FSDP2): shard a network block by block, gather it once for a rollout, or whole for export.

Without a device mesh (one process, DDP) nothing here does anything.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


def skeleton_unless_first(mesh: DeviceMesh | None) -> AbstractContextManager:
    """Where networks are built that will be sharded: really on rank 0, on the other ranks as shapes without memory.

    So a model that no device can hold takes the memory of one machine once, not of every process.
    """
    return nullcontext() if mesh is None or mesh.get_local_rank() == 0 else torch.device("meta")


def shard(network: nn.Module, mesh: DeviceMesh | None) -> None:
    """Spread a network's parameters over the ranks of a mesh, each of its blocks a unit, with rank 0's values.

    A unit is gathered for its forward and its backward and given up again. Units are the layers that the model names in
    `_no_split_modules`, and what remains belongs to the parts that are called as modules: see `callable_parts`.
    """
    if mesh is None:
        return
    # A language model's logits are a view; nothing here writes into them.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")
    rank_0 = {name: parameter.data for name, parameter in network.named_parameters()}
    for part in callable_parts(network):
        for unit in [*blocks(part), part]:
            # Also the outermost, which FSDP2 by default leaves gathered for the backward: a frozen network has none.
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    _materialize(network, rank_0, mesh)


def callable_parts(network: nn.Module) -> list[nn.Module]:
    """The modules of a network that are called by their `__call__`, where FSDP2 hooks in."""
    return network.called_modules() if hasattr(network, "called_modules") else [network]


def blocks(network: nn.Module) -> list[nn.Module]:
    """The layers that a Hugging Face model wants kept whole, such as `LlamaDecoderLayer`."""
    names = {
        name
        for module in network.modules()
        if isinstance(module, PreTrainedModel)
        for name in module._no_split_modules or ()
    }
    return [module for module in network.modules() if type(module).__name__ in names]


@torch.no_grad()
def _materialize(network: nn.Module, rank_0: dict[str, Tensor], mesh: DeviceMesh) -> None:
    """Give every rank its shard of rank 0's parameters, and rank 0's buffers, one tensor at a time."""
    first, group = mesh.get_local_rank() == 0, mesh.get_group()
    device = torch.device(mesh.device_type)  # of an accelerator, the one that Lightning made the current one
    source = dist.get_global_rank(group, 0)
    if not first:
        network.to_empty(device=device)
    for name, parameter in network.named_parameters():
        whole = rank_0[name].to(device) if first else torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        dist.broadcast(whole, source, group=group)
        mine = distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(mine.to_local())
    for buffer in network.buffers():
        dist.broadcast(buffer, source, group=group)


@contextmanager
def unsharded(*networks: nn.Module) -> Iterator[None]:
    """Gather the networks once and keep them whole within the context: one gather a rollout instead of one a token.

    Ranks may make different numbers of forward passes within it, since none of them communicates. All ranks must enter
    and leave.
    """
    units = [module for network in networks for module in network.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


def num_chunks(rows: int, size: int, mesh: DeviceMesh | None) -> int:
    """In how many chunks of about `size` to pass rows through a network: under FSDP2 the same number on all ranks.

    Ranks whose numbers of rows differ by one would otherwise make different numbers of forward passes, and wait for
    each other for ever; a chunk may then hold one row more than `size`.
    """
    chunks = -(-rows // size)
    if mesh is None:
        return chunks
    fewest = torch.tensor(chunks, device=torch.device(mesh.device_type))
    dist.all_reduce(fewest, dist.ReduceOp.MIN, group=mesh.get_group())
    return int(fewest)


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors, on the CPU; on the first rank only, but all ranks must call it."""
    keep = not dist.is_initialized() or dist.get_rank() == 0
    state = {}
    for name, value in network.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            state[name] = whole.cpu()
    return state


def whole_copy(network: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """The network with whole weights, on the CPU, for export; on ranks other than the first, which must call it too, a
    shape without weights. `build` makes the network as it was before it was sharded."""
    state = whole_state(network)
    with torch.device("meta"):
        copy = build()
    copy.load_state_dict(state, strict=False, assign=True)
    for mine, theirs in zip(_models(copy), _models(network), strict=True):
        mine.config = theirs.config
        mine.tie_weights()
    return copy


def _models(network: nn.Module) -> list[PreTrainedModel]:
    return [module for module in network.modules() if isinstance(module, PreTrainedModel)]


def is_sharded(network: nn.Module) -> bool:
    """Whether a network's parameters are spread over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, of all their shards; all ranks must call it."""
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
