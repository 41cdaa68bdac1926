"""One process against two: tokens per second, bytes sent and bytes held, on a Llama of 8 million parameters.

    python benchmarks/scaling.py --out runs/scaling

It trains PPO and SFT by DDP and FSDP2 on the CPU and compares what it counts with the formulas of `memory_model.py` and
`communication_model.py`. Tables go to stdout, what they are made of as JSON to the folder. Some 10 minutes on 2 cores.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from capacity import table
from scaling_worker import PPO, RUNS, SMALL, Row
from small_llama import write_models

WORKER = Path(__file__).with_name("scaling_worker.py")
HALF = dict(rollout_batch_size=PPO.rollout_batch_size // 2, batch=PPO.batch // 2, forward_batch_size=PPO.batch)
SMALLER = dict(rollout_batch_size=16, response=16, forward_batch_size=8)  # every operation is looked at
PROBES = [
    ("PPO", "ddp"),
    ("PPO, LoRA", "ddp"),
    ("SFT", "ddp"),
    ("PPO", "fsdp2"),
    ("PPO, per-token gathers", "fsdp2"),
    ("PPO, value network", "fsdp2"),
    ("PPO, LoRA, bfloat16", "fsdp2"),
    ("PPO, LoRA, last layer", "fsdp2"),
    ("SFT", "fsdp2"),
]
SAVED = [name for name in RUNS if name != "PPO, per-token gathers"]
ALONE = "1"
TIMED = {  # copies at the same time, strategy, what differs
    ALONE: (1, "auto", {}),
    "2 that share nothing": (2, "auto", {}),
    "2, DDP, each with as much": (1, "ddp", {}),
    "2, FSDP2, each with as much": (1, "fsdp2", {}),
    "2, DDP, together as much": (1, "ddp", HALF),
    "2, FSDP2, together as much": (1, "fsdp2", HALF),
}
PARTS = ("sampling", "scoring", "update", "total", "collectives")


def command(folder: Path, kind: str, processes: int, names: list[str]) -> list[str]:
    """Of so many processes that find something together."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else []), str(WORKER), str(folder), kind, *names]


def work(folders: list[Path], kind: str, processes: int, names: list[str]) -> list[Row]:
    """What processes find that run together, or, given several folders, apart from each other at the same time.

    Each has one thread, so that two have twice the cores of one.
    """
    environment, stem = os.environ | {"OMP_NUM_THREADS": "1"}, f"{kind}-{processes}"
    running = []
    for folder in folders:
        with (folder / f"{stem}.log").open("w") as log:
            arguments = dict(stdout=log, stderr=subprocess.STDOUT, env=environment)
            running.append(subprocess.Popen(command(folder, kind, processes, names), **arguments))
    codes = [process.wait() for process in running]
    for folder, code in zip(folders, codes, strict=True):
        if code:
            raise RuntimeError(f"{stem} ended with code {code}:\n{(folder / f'{stem}.log').read_text()[-3000:]}")
    return [row for folder in folders for row in json.loads((folder / f"{stem}.json").read_text())]


def speed(folders: list[Path], rounds: int) -> tuple[list[str], list[Row]]:
    """Iterations of PPO on one and on two processes, in several rounds, against drift of the machine."""
    found: dict[str, list[Row]] = {name: [] for name in TIMED}
    rates: dict[str, list[float]] = {name: [] for name in TIMED}
    for _ in range(rounds):
        for name, (copies, strategy, changes) in TIMED.items():
            processes = 1 if strategy == "auto" else 2
            rows = work(folders[:copies], "timed", processes, [f"PPO|{strategy}|{json.dumps(changes)}"])
            found[name] += [row | {"name": name} for row in rows]
            rates[name].append(sum(row["tokens"] / row["total"] for row in rows))
    lines = []
    for name, rows in found.items():
        of_one = sum(rates[name]) / sum(rates[ALONE])
        parts = [f"{sum(row[part] for row in rows) / len(rows):.2f}" for part in PARTS]
        lines.append([name, ", ".join(f"{rate:.0f}" for rate in rates[name]), f"{of_one:.2f}", *parts])
    header = ["processes", "tokens/s, each round", "of one's", *PARTS]
    return list(table(header, lines)), [row for rows in found.values() for row in rows]


def compared(rows: list[Row]) -> Iterator[str]:
    """A line per run: each kind's megabytes, and in brackets measured to formula."""
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    found: dict[tuple, dict] = {}
    for row in rows:
        found.setdefault((row["run"], row["strategy"]), {})[row["what"]] = cell(row)
    lines = [[*key, *[cells.get(kind, "") for kind in kinds]] for key, cells in found.items()]
    return table(["run", "strategy", *kinds], lines)


def cell(row: Row) -> str:
    """Measured megabytes (measured to formula)."""
    return f"{row['measured'] / 1e6:.2f} ({row['measured'] / row['formula']:.3f})" if row["formula"] else ""


def machine() -> str:
    """What it ran on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.processor()
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}; load average at the start {load}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--rounds", type=int, default=2, help="of the timings; 0 leaves them out")
    args = parser.parse_args()
    folders = [args.out, args.out / "second"]
    transformers.utils.logging.disable_progress_bar()
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        write_models(SMALL, folder)
    result = {"machine": machine()}
    print(f"{result['machine']}\n")
    if args.rounds:
        lines, result["speed"] = speed(folders, args.rounds)
        print("### PPO, seconds per iteration\n", *lines, "", sep="\n")
    smaller = json.dumps(SMALLER)
    result["saved"] = work(folders[:1], "saved", 1, [f"{name}|auto|" for name in SAVED])
    result["held and sent"] = [
        *work(folders[:1], "probe", 1, [f"PPO|auto|{smaller}"]),
        *work(folders[:1], "probe", 2, [f"{name}|{strategy}|{smaller}" for name, strategy in PROBES]),
    ]
    for title in ("saved", "held and sent"):
        print(f"### MB {title} per process, and its ratio to the formula\n", *compared(result[title]), "", sep="\n")
    (args.out / "scaling.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
