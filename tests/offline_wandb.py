"""Reads what an offline W&B run left on disk: the records of its .wandb file, and its tables."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


def payloads(path: Path) -> Iterator[bytes]:
    """Whole records of a LevelDB log: blocks of 32 KiB, in them pieces of crc32, length, kind, data."""
    data = path.read_bytes()
    position, record = HEADER, b""
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # what is left of a block is padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        position += HEADER + length
        if position > len(data):  # still being written
            return
        record += data[position - length : position]
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield record
            record = b""


def finished(path: Path, seconds: float = 60.0) -> list[Any]:
    """All records: the service writes its last ones some time after `finish` has returned."""
    end = time.monotonic() + seconds
    while True:
        records = [wandb_internal_pb2.Record.FromString(payload) for payload in payloads(path)]
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < end, f"{path} has no end"
        time.sleep(0.1)


class OfflineRun:
    """The offline run under a folder; there must be just one.

    Args:
        root: where `wandb/` is.
        kind: what its folder is called before the date: an online run leaves such a file, too.
    """

    def __init__(self, root: Path, kind: str = "offline-run") -> None:
        (self.folder,) = sorted(root.glob(f"wandb/{kind}-*"))
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        (path,) = self.folder.glob("*.wandb")
        for record in finished(path):
            self._read(record)

    def _read(self, record: Any) -> None:
        if record.HasField("history"):
            self.history.append(_items(record.history.item))
        elif record.HasField("summary"):
            self._update(self.summary, _items(record.summary.update))
        elif record.HasField("metric"):
            self.metrics[record.metric.name or record.metric.glob_name] = record.metric

    def _update(self, known: dict[str, Any], new: dict[str, Any]) -> None:
        for name, value in new.items():
            if isinstance(value, dict) and isinstance(known.get(name), dict):
                self._update(known[name], value)
            else:
                known[name] = value

    def names(self) -> set[str]:
        """Of all that was logged."""
        return {name for row in self.history for name in row}

    def series(self, x: str, y: str) -> list[tuple[Any, Any]]:
        """Points of a curve: the rows that have both."""
        return [(row[x], row[y]) for row in self.history if x in row and y in row]

    def tables(self, key: str) -> list[dict[str, Any]]:
        """All tables that were logged under a key, in order: their columns and data."""
        logged = [row[key]["path"] for row in self.history if key in row]
        return [json.loads((self.folder / "files" / path).read_text()) for path in logged]


def _items(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        *outer, name = item.nested_key or [item.key]
        inner = found
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[name] = json.loads(item.value_json)
    return found
