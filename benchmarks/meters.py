"""What `scaling.py` reads off a training: bytes of tensors, bytes sent, seconds."""

import functools
import os
import socket
import statistics
import struct
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BYTES_ACKED = 120  # where Linux's struct tcp_info has tcpi_bytes_acked
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "broadcast",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's parts."""
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


def sent_bytes() -> int:
    """Bytes that this process has sent over its open TCP connections and that have arrived, by the kernel's count.

    The loopback device's counter would count other programs, too.
    """
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError, struct.error):  # closed by now, or no TCP connection
            if os.readlink(entry).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED + 8)
                    total += struct.unpack_from("Q", info, BYTES_ACKED)[0]
    return total


def saved_for_backward(networks: list[nn.Module], forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass leaves for the backward pass, each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for network in networks for p in network.parameters()}
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in storages.values())
    del result
    return total


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors took at any moment: of those that were made while it is on, and those given to `add`.

    What is inside an operation, or in C++ (DDP's buckets, gloo's buffers), is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def add(self, tensors: Iterable[Tensor]) -> bool:
        """Count these from now on; tells whether one is new."""
        found = False
        for tensor in tensors:
            storage = local(tensor).untyped_storage()
            known = self._storages.get(storage._cdata)
            if known is None or known() is None:  # an address may be in use for the second time
                self._storages[storage._cdata] = weakref.ref(storage)
                found = True
        return found

    def now(self) -> int:
        """Bytes at this moment; a storage may have changed its size since it was made."""
        alive = {key: storage for key, ref in self._storages.items() if (storage := ref()) is not None}
        self._storages = {key: self._storages[key] for key in alive}
        return sum(storage.nbytes() for storage in alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.add(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            self.peak = max(self.peak, self.now())
        return out


class Stopwatch:
    """Seconds by name; times that overlap, or lie within each other, count once."""

    def __init__(self) -> None:
        self._spans: dict[str, list[tuple[float, float]]] = {}

    def add(self, name: str, start: float) -> None:
        """From `start`, of `time.perf_counter`, until now."""
        self._spans.setdefault(name, []).append((start, time.perf_counter()))

    def around(self, name: str, function: Callable) -> Callable:
        """The same function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(name, start)

        return timed

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        spans, self._spans = self._spans, {}
        return {name: _covered(sorted(times)) for name, times in spans.items()}

    @contextmanager
    def on_collectives(self) -> Iterator[None]:
        """Time spent in torch.distributed, the wait for slower ranks included."""
        originals = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
        for name, function in originals.items():
            setattr(dist, name, self.around("collectives", function))
        try:
            yield
        finally:
            for name, function in originals.items():
                setattr(dist, name, function)

    def all_reduce(self, ranks: int, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """DDP's own all-reduce of a bucket, timed until it has arrived: a communication hook."""
        start = time.perf_counter()
        future = dist.all_reduce(bucket.buffer().div_(ranks), async_op=True).get_future()

        def arrived(future: torch.futures.Future[torch.Tensor]) -> Tensor:
            self.add("collectives", start)
            return future.value()[0]

        return future.then(arrived)


def _covered(spans: list[tuple[float, float]]) -> float:
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def median_seconds(phase: Callable[[], object], repetitions: int) -> float:
    """Of a phase, the median after one run to warm up."""
    phase()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        phase()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
