"""The instruments of the scaling benchmark, on things whose size is known."""

import socket
import time

import pytest
import torch
from meters import LiveBytes, Stopwatch, saved_for_backward, sent_bytes, size
from torch import nn


def test_sent_bytes_counts_this_processs_connections():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sender,
        server.accept()[0] as receiver,
    ):
        before = sent_bytes()
        sender.sendall(b"x" * 100_000)
        received = 0
        while received < 100_000:
            received += len(receiver.recv(65536))
        deadline = time.monotonic() + 5
        while sent_bytes() < before + 100_000 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sent_bytes() - before == 100_000


def test_size_is_in_bytes():
    assert size([torch.zeros(3, 4), torch.zeros(5, dtype=torch.bfloat16)]) == 48 + 10


def test_saved_for_backward_counts_each_storage_once_and_no_parameter():
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(10, 8)
    # The layer saves x and its weight; exp its result; the product exp's result again, and x.
    assert saved_for_backward([layer], lambda: layer(x).exp() * x) == 2 * 320


def test_live_bytes_sees_what_is_gone_again():
    with LiveBytes() as live:
        x = torch.zeros(1000)
        y = x + 1
        del x
        assert live.now() == 4000
    assert live.peak == 8000
    del y


def test_live_bytes_follows_a_storage_that_changes_its_size():
    with LiveBytes() as live:
        x = torch.zeros(1000)
        x.untyped_storage().resize_(0)
        assert live.now() == 0


def test_times_within_each_other_count_once(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 10.0, 11.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch()
    inner = watch.around("a", lambda: None)
    watch.around("a", inner)()  # 0 to 4, with 1 to 3 in it
    watch.around("a", lambda: None)()  # 10 to 11
    assert watch.take() == {"a": pytest.approx(5.0)}
    assert watch.take() == {}
