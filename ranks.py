"""Objects of all processes of a run."""

from typing import Any

import torch.distributed as dist


def of_all_ranks(value: Any) -> list[Any]:
    """Every rank's value (anything that can be pickled), by rank, on every rank; all must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
