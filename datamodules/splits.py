"""Splitting rows: by name, by a hash of their text, by a seeded draw."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset

from .sources import iterate


def first_of(splits: Mapping[str, Dataset], *names: str) -> Dataset:
    """The first split there is."""
    return next(splits[name] for name in names if name in splits)


def draw(dataset: Dataset, count: int | None, seed: int) -> Dataset:
    """`count` rows at random; all of them, in order, if there are no more."""
    if count is None or count >= len(dataset):
        return dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return dataset.select(order[:count].tolist(), keep_in_memory=True)


def hold_out(dataset: Dataset, share: float, identity: Callable[[dict[str, Any]], Any]) -> dict[str, Dataset]:
    """Split rows into train and validation by a hash of what `identity` finds in them."""
    held_out = [unit_hash(identity(row)) < share for row in iterate(dataset)]
    if all(held_out) or not any(held_out):
        side = "training" if all(held_out) else "validation"
        raise ValueError(f"`val_share`={share} of {len(held_out)} rows leaves no {side} row; change it")
    sides = {"train": False, "validation": True}
    return {
        split: dataset.select([i for i, side in enumerate(held_out) if side == wanted], keep_in_memory=True)
        for split, wanted in sides.items()
    }


def unit_hash(value: Any) -> float:
    """A number in [0, 1) that depends on the value alone: the same in every run and on every machine."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48
