"""What several callbacks need: gathering over ranks, plain numbers, whole files, time and memory."""

import math
import os
import sys
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist

Columns = dict[str, list]

_MISSING = object()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank. All ranks must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def interleave(parts: list[list]) -> list:
    """Undo the dealing out of a DistributedSampler: sample i went to rank i % world."""
    rounds = zip_longest(*parts, fillvalue=_MISSING)
    return [row for row in chain.from_iterable(rounds) if row is not _MISSING]


def final_metrics(trainer: L.Trainer) -> dict[str, float]:
    """`trainer.callback_metrics` as floats.

    Call it on every rank, also where only rank zero uses the answer: reading a metric logged with `sync_dist` may start
    a collective.
    """
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def json_safe(value: Any) -> Any:
    """Tensors as numbers or lists; NaN and infinities, which JSON lacks, as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    return value


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is at no moment half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def peak_memory_gib() -> float | None:
    """Largest resident memory of this process so far, in GiB; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB


def wall_time(seconds: float) -> str:
    """A duration for people: "42 s", "3 min 05 s", "2 h 07 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
