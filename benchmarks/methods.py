"""Every method on the demo's data, with as many sampled tokens each: reward, gold score, KL, seconds, memory.

    make demo                                         # once, for the SFT model and the reward model
    python benchmarks/methods.py                      # three seeds; hours on two cores. Done runs are not repeated
    python benchmarks/methods.py --methods ppo grpo --seeds 1

Each run is `train.py fit` on the method's own config in `configs/demo/`, with the seed and the number of iterations
set, in a process of its own with one thread, as many side by side as there are cores. Seconds are those that a process
was on its core, start included. Each policy is then judged in the same way: `train.py validate` samples a continuation
of the same held-out openings, with the same noise, and measures reward, VADER's score and the KL to the SFT model. The
offline methods learn from pairs that the SFT model sampled: as many responses as the others sample while they learn.
Results: RUNS/<method>-<seed>/result.json, and a table.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
ON_POLICY = ("ppo", "grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp", "online_dpo", "rft")
OFFLINE = ("dpo", "ipo", "simpo", "cpo", "orpo", "kto")
WITHOUT_TRAINING = ("sft", "best_of_n")
NAMES = {
    "sft": "SFT (the start)",
    "best_of_n": "best of 4",
    "ppo": "PPO",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "dapo": "DAPO",
    "gspo": "GSPO",
    "rloo": "RLOO",
    "reinforce_pp": "REINFORCE++",
    "online_dpo": "online DPO",
    "rft": "RFT",
    "dpo": "DPO",
    "ipo": "IPO",
    "simpo": "SimPO",
    "cpo": "CPO",
    "orpo": "ORPO",
    "kto": "KTO",
}
RESPONSES_PER_ITERATION = 48
FIELDS = ("reward", "gold", "kl", "seconds", "gib")


def train(*arguments: str) -> tuple[float, float]:
    """Run train.py on one core; seconds on it and peak memory in GiB of its process."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments, "--trainer.logger", "false"]
    one_core = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=one_core, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        said.seek(0)
        if status:
            code = os.waitstatus_to_exitcode(status)  # negative: a signal
            raise SystemExit(f"{' '.join(command)}\nfailed with code {code}:\n{said.read()[-5000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def sample_pairs(seed: int, iterations: int, runs: Path) -> None:
    """What the offline methods learn from: as many responses as the others sample."""
    folder, rows = runs / f"pairs-{seed}", iterations * RESPONSES_PER_ITERATION // 2
    if not (folder / "predictions.jsonl").exists():
        train("predict", "--config", "configs/demo/pairs.yaml", "--seed_everything", str(seed),
              "--data.max_rows", str(rows), "--trainer.default_root_dir", str(folder))  # fmt: skip


def fit(method: str, seed: int, iterations: int, runs: Path) -> tuple[float, float]:
    """Train a method; what it took."""
    folder = runs / f"{method}-{seed}"
    flags = ["--config", f"configs/demo/{method}.yaml", "--seed_everything", str(seed)]
    flags += ["--trainer.default_root_dir", str(folder)]
    if method in OFFLINE:
        flags += ["--data.data", str(runs / f"pairs-{seed}" / "predictions.jsonl")]
    else:
        flags += ["--trainer.max_epochs", str(iterations), "--trainer.num_sanity_val_steps", "0"]
        flags += ["--trainer.limit_val_batches", "0"]
    return train("fit", *flags)


def judge(method: str, seed: int, runs: Path) -> dict[str, float]:
    """Reward, gold score and KL on held-out openings."""
    folder = runs / f"{method}-{seed}"
    config = "best_of_n" if method == "best_of_n" else "grpo"
    model = "runs/demo/sft/model" if method in WITHOUT_TRAINING else str(folder / "model")
    train("validate", "--config", f"configs/demo/{config}.yaml", "--model.model", model,
          "--model.reference", "runs/demo/sft/model", "--model.lora_r", "0", "--model.lora_last_layers", "null",
          "--seed_everything", str(seed), "--trainer.default_root_dir", str(folder / "judged"))  # fmt: skip
    header, *rows = (folder / "judged" / "validate" / "metrics.csv").read_text().splitlines()
    found = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    kl = "val/kl_bound" if method == "best_of_n" else "val/kl"
    return {
        "reward": float(found["val/reward"]),
        "gold": float(found["val/reward/vader_compound"]),
        "kl": float(found[kl]),
    }


def run(method: str, seed: int, iterations: int, runs: Path) -> None:
    """Train and judge one method with one seed, if that is not done."""
    done = runs / f"{method}-{seed}" / "result.json"
    if done.exists():
        return
    seconds, gib = (0.0, 0.0) if method in WITHOUT_TRAINING else fit(method, seed, iterations, runs)
    result = {"method": method, "seed": seed, "iterations": iterations, "seconds": seconds, "gib": gib}
    result |= judge(method, seed, runs)
    done.write_text(json.dumps(result, indent=2) + "\n")
    print(*(f"{value:.2f}" if isinstance(value, float) else value for value in result.values()), flush=True)


def table(runs: Path, methods: list[str], seeds: list[int]) -> Iterator[str]:
    """A Markdown table: mean ± standard deviation over seeds."""
    yield "| method | reward | VADER (gold) | KL, nats | seconds | GiB |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for method in methods:
        paths = [runs / f"{method}-{seed}" / "result.json" for seed in seeds]
        results = [json.loads(path.read_text()) for path in paths if path.exists()]
        if not results:
            continue
        cells = []
        for field in FIELDS:
            values = [result[field] for result in results]
            digits = 0 if field == "seconds" else 1 if field in ("kl", "gib") else 2
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and field in FIELDS[:3] else ""
            mean = statistics.mean(values)
            bound = "≤ " if method == "best_of_n" and field == "kl" else ""
            cells.append("" if field in ("seconds", "gib") and not mean else f"{bound}{mean:.{digits}f}{spread}")
        yield f"| {NAMES[method]} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [*WITHOUT_TRAINING, *ON_POLICY, *OFFLINE]
    parser.add_argument("--methods", nargs="+", default=everything, choices=everything, metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=10, help="of 48 responses each")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    args = parser.parse_args()
    runs = args.runs.resolve()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if set(args.methods) & set(OFFLINE):
            list(pool.map(lambda seed: sample_pairs(seed, args.iterations, runs), args.seeds))
        jobs = itertools.product(args.seeds, args.methods)
        list(pool.map(lambda job: run(job[1], job[0], args.iterations, runs), jobs))
    print("\n".join(table(runs, args.methods, args.seeds)))


if __name__ == "__main__":
    main()
