"""What both sides of `versus.py` share: the job that a worker is given, and the record that it writes.

Neither library is imported here: the one that is measured shall not carry the other's modules in its memory.
"""

import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

COMMON = ("torch", "transformers", "datasets", "tokenizers")


@dataclass(frozen=True)
class Job:
    """One run of one library."""

    case: str
    side: str
    """`own`, or the peer with its release."""
    method: str
    """ppo, grpo, dpo, reward or sft."""
    policy: str
    """Folder of the language model."""
    reward: str
    """Folder of the reward model."""
    data: str
    """A .jsonl file."""
    rows: int
    """Of an iteration: responses, pairs or texts."""
    learning_rate: float
    warmup: int
    """Iterations before those that are measured."""
    iterations: int
    accelerator: str
    threads: int
    group_size: int = 1
    minibatch: int = 0
    passes: int = 0
    max_new_tokens: int = 0
    min_new_tokens: int = 0
    value_network: bool = False
    lora_r: int = 0
    compiled: bool = False
    """By `torch.compile`; of this project alone."""

    @property
    def total(self) -> int:
        """Iterations of the whole run."""
        return self.warmup + self.iterations

    @property
    def steps(self) -> int:
        """Optimizer steps per iteration."""
        return self.passes * self.rows // self.minibatch if self.minibatch else 1


class Record:
    """Seconds, tokens and optimizer steps of each iteration, from the end of one to the end of the next."""

    def __init__(self) -> None:
        self.laps: list[dict[str, float]] = []
        self._start, self._tokens, self._steps = 0.0, 0, 0
        self._rewards: list[float] = []
        self._hook = register_optimizer_step_post_hook(self._stepped)  # of every optimizer in the process

    def _stepped(self, *_: Any) -> None:
        self._steps += 1

    def start(self) -> None:
        """The first iteration begins."""
        self._start = _now()

    def count(self, tokens: int | torch.Tensor) -> None:
        """So many tokens more in this iteration: sampled, or, of given texts, learned from; no padding."""
        self._tokens += int(tokens)

    def reward(self, rewards: Iterable[float]) -> None:
        """Of responses in this iteration."""
        self._rewards += rewards

    def lap(self) -> None:
        """An iteration ends, the next begins."""
        now = _now()
        reward = statistics.mean(self._rewards) if self._rewards else 0.0
        lap = {"seconds": now - self._start, "tokens": self._tokens, "steps": self._steps, "reward": reward}
        self.laps.append(lap)
        self._start, self._tokens, self._steps, self._rewards = now, 0, 0, []

    def result(self, job: Job, packages: tuple[str, ...], figures: dict[str, float]) -> dict[str, Any]:
        """All of a run, for its file.

        Args:
            job: what was to be done.
            packages: names of those whose versions count, beside `COMMON`.
            figures: the last ones that the library logged.
        """
        self._hook.remove()
        if len(self.laps) != job.total:
            raise RuntimeError(f"{job.total} iterations were asked for, {len(self.laps)} were done.")
        measured = self.laps[job.warmup :]
        columns = {name: [lap[name] for lap in measured] for name in ("seconds", "tokens", "steps")}
        versions = {"python": platform.python_version()}
        versions |= {name: importlib.metadata.version(name) for name in (*packages, *COMMON)}
        return {
            "job": asdict(job),
            "median": statistics.median(columns["seconds"]),
            **columns,
            "warmup_seconds": [lap["seconds"] for lap in self.laps[: job.warmup]],
            "rewards": [lap["reward"] for lap in self.laps],
            "gib": peak_gib(),
            "figures": figures,
            "versions": versions,
            "cpu": cpu(),
        }


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib() -> float:
    """Most memory: of the GPU if one was used, else resident in this process since it began (Linux)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return high_water(Path("/proc/self/status").read_text())


def high_water(status: str, field: str = "VmHWM") -> float:
    """GiB in a field of the text of /proc/PID/status.

    Not `ru_maxrss`: that is handed down to a process by the one that started it.
    """
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines[field].split()[0]) / 2**20  # the file has kB


def cpu() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def lower_case_share(texts: list[str]) -> list[float]:
    """The reward of GRPO: costs nothing, and differs within a group."""
    return [sum(character.islower() for character in text) / max(len(text), 1) for text in texts]


def numbers(figures: dict[str, Any]) -> dict[str, float]:
    """Those that are one number."""
    single = {k: v for k, v in figures.items() if isinstance(v, int | float) or (torch.is_tensor(v) and v.numel() == 1)}
    return {name: float(value) for name, value in single.items()}


def work(do: Callable[[Job, Record], dict[str, Any]], packages: tuple[str, ...]) -> None:
    """A worker's whole life: read the job, do it, write the result.

    Run as: python WORKER.py JOB.json RESULT.json
    """
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(job.threads)
    record = Record()
    figures = numbers(do(job, record))
    result, out = record.result(job, packages, figures), Path(sys.argv[2])
    out.with_suffix(".partial").write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".partial").rename(out)  # whole or not at all: what is there is not done again
