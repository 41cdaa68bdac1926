"""Starting several processes of one training, and seeing that none of them outlives a test."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

TIMEOUT = 480


def ranks(command: Sequence[str], count: int = 2) -> list[tuple[list[str], dict[str, str]]]:
    """A command as `count` ranks on this machine, as torchrun would start them: (command, environment) of each."""
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "test",
    }
    return [([*command], shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]


def node(rank: int, port: int) -> list[str]:
    """The start of the command that runs a script as one of two nodes."""
    flags = f"--nnodes=2 --nproc-per-node=1 --node-rank={rank} --master-addr=127.0.0.1 --master-port={port}"
    return [sys.executable, "-m", "torch.distributed.run", *flags.split()]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_together(
    *commands: list[str], log_folder: Path, environments: Sequence[Mapping[str, str]] | None = None
) -> None:
    """Run commands side by side; if one fails or takes too long, stop all and show what all of them wrote."""
    log_folder.mkdir(parents=True, exist_ok=True)
    logs = [log_folder / f"{i}.log" for i in range(len(commands))]
    processes = []
    for command, log, own in zip(commands, logs, environments or [{}] * len(commands), strict=True):
        with log.open("w") as out:
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | own
            processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment))
    deadline = time.monotonic() + TIMEOUT
    try:
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        codes = [p.poll() for p in processes]
        stop(processes)
    if any(code != 0 for code in codes):
        outputs = "\n".join(f"--- {i}: exit code {code} ---\n{logs[i].read_text()}" for i, code in enumerate(codes))
        pytest.fail(f"A process failed, or took more than {TIMEOUT} s (exit code None).\n{outputs}", pytrace=False)


def stop(processes: list[subprocess.Popen]) -> None:
    """End what still runs: first kindly, so that torchrun ends its workers, then not."""
    running = [p for p in processes if p.poll() is None]
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
