"""Arguments and settings that cannot work, refused before a model is loaded."""

from types import FrameType

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.distributed.device_mesh import DeviceMesh

Plain = str | int | float | bool | None


def check_strategy(trainer: L.Trainer, mesh: DeviceMesh | None) -> None:
    """ValueError for a strategy under which the modules would fail, or learn something else without a word."""
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
        raise ValueError(
            f"`--trainer.strategy`: {type(strategy).__name__} cannot train this module, which divides gradients by the "
            "global number of items and, in RL, samples between the steps. For sharded weights give `fsdp2`, or `ddp`."
        )
    if mesh is not None and "tensor_parallel" in mesh.mesh_dim_names and mesh["tensor_parallel"].size() > 1:
        raise ValueError("`--trainer.strategy`: tensor parallelism is not supported; `fsdp2` shards over all ranks.")


def check_precision(precision: str, dtype: str, mesh: DeviceMesh | None) -> None:
    """ValueError for float16 mixed precision where its gradient scaler cannot work."""
    if precision == "16-mixed" and (mesh is not None or dtype != "float32"):
        raise ValueError(
            "`--trainer.precision 16-mixed` scales the gradients of float32 weights, on each rank by itself: it works "
            f"with `dtype` float32 (here {dtype}) and without sharding. Use `bf16-mixed`."
        )


def require(name: str, holds: bool, expected: str, got: object) -> None:
    """ValueError that names the argument, what was expected and what came."""
    if not holds:
        raise ValueError(f"`{name}` must be {expected}, but got {got!r}.")


def require_divides(name: str, divisor: int, whole_name: str, whole: int) -> None:
    """ValueError with both numbers unless one divides the other."""
    require(name, divisor >= 1, "at least 1", divisor)
    if whole % divisor:
        raise ValueError(f"`{name}` must divide `{whole_name}`: {whole} / {divisor} = {whole / divisor:g}.")


def objects_given(self: object, frame: FrameType | None) -> list[str]:
    """Names of the constructor arguments, of this class and its subclasses, that are no plain values."""
    names = []
    while frame is not None and frame.f_locals.get("self") is self and frame.f_code.co_name == "__init__":
        given = frame.f_locals | frame.f_locals.get("kwargs", {})
        names += [name for name, value in given.items() if name != "kwargs" and not _is_plain(value)]
        frame = frame.f_back
    return names


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Plain) or (isinstance(value, list | tuple) and all(_is_plain(v) for v in value))
