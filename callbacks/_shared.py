"""What several callbacks need: plain numbers, where a run stands, whole files, memory."""

import math
import os
import sys
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import lightning as L

Columns = dict[str, list]

_MISSING = object()


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


def ends_epoch(trainer: L.Trainer) -> bool:
    """Whether no step follows in this epoch."""
    return trainer.is_last_batch or trainer.global_step >= trainer.max_steps >= 0


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
