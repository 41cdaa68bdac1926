"""How seconds and memory of a PPO iteration grow with the batch, the responses, the vocabulary, the model and the run.

    python benchmarks/growth.py --out runs/growth           # some 9 minutes on 2 cores; draws runs/growth/growth.png

Each point is a process of its own: PPO with a value head and a reward model on a random Llama, all weights trained, by
the default paths, no response ends early. Seconds are the median of the iterations after the first. Memory is the most
that was ever resident, less what was there before the models were (Linux). `slope` is that of log y against log x over
a whole sweep, `last` that of its last step: 1 is linear, less is a fixed part that still counts. `longer run` is one
process: memory at the end of its first tenth and of all of it.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import matplotlib
import numpy as np
from capacity import table
from model_shapes import Run, Shape
from small_llama import make_data, make_module, write_models
from versus_worker import high_water

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

SMALL = Shape(layers=4, hidden=256, heads=8, kv_heads=4, head_dim=32, intermediate=1024, vocabulary=8192)
BASE = Run("ppo", SMALL, batch=16, prompt=16, response=32, rollout_batch_size=64, forward_batch_size=64)
ITERATIONS, LONG = 4, 50


def batch(rows: int) -> Run:
    """Minibatches of so many rows, four to an iteration."""
    return replace(BASE, batch=rows, rollout_batch_size=4 * rows)


def model(scale: int) -> Run:
    """As many layers as width, both grow."""
    shape = replace(SMALL, layers=scale, hidden=64 * scale, heads=2 * scale, kv_heads=scale, intermediate=256 * scale)
    return replace(BASE, shape=shape)


SWEEPS: dict[str, dict[int, Run]] = {
    "rows of a minibatch": {rows: batch(rows) for rows in (4, 8, 16, 32, 64)},
    "response tokens": {
        tokens: replace(BASE, batch=4, rollout_batch_size=16, response=tokens) for tokens in (32, 64, 128, 256, 512)
    },
    "vocabulary": {
        size: replace(BASE, shape=replace(SMALL, vocabulary=size)) for size in (4096, 8192, 16384, 32768, 65536)
    },
    "weights of the blocks": {
        sum(rows * columns for rows, columns in model(scale).shape.linears) * scale: model(scale)
        for scale in (3, 4, 6, 8)
    },
}
TINY = replace(BASE, shape=Shape(2, 32, 4, 2, 8, 64, 128), batch=4, prompt=4, response=4, rollout_batch_size=8)


class Watch(L.Callback):
    """Seconds of each iteration, and what is resident after it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.resident: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._start)
        self.resident.append(memory("VmRSS"))
        self._start = now


def memory(field: str) -> float:
    """MiB of this process: VmRSS is resident now, VmHWM at most so far."""
    return 1024 * high_water(Path("/proc/self/status").read_text(), field)


def measure(run: Run, iterations: int) -> dict[str, Any]:
    """One point, in this process."""
    warnings.simplefilter("ignore")
    watch = Watch()
    with TemporaryDirectory() as folder:
        write_models(run.shape, Path(folder))
        before = memory("VmRSS")
        L.seed_everything(0, verbose=False)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=iterations,
            callbacks=[watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(make_module(run, Path(folder), plain=False), make_data(run, 1))
    seconds = statistics.median(watch.seconds[1:])
    return {"seconds": seconds, "mib": memory("VmHWM") - before, "resident": watch.resident}


def in_a_process(run: Run, iterations: int, threads: int) -> dict[str, Any]:
    """One point."""
    fields = json.dumps(asdict(run) | {"iterations": iterations})
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--point", fields]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{fields}\nfailed with code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def slopes(x: list[float], y: list[float]) -> tuple[float, float]:
    """Of log y against log x: by least squares over all points, and between the last two."""
    log_x, log_y = np.log(x), np.log(y)
    whole = np.polyfit(log_x, log_y, 1)[0]
    return float(whole), float((log_y[-1] - log_y[-2]) / (log_x[-1] - log_x[-2]))


def report(found: dict[str, dict[str, dict]], longer: dict[str, Any]) -> Iterator[str]:
    """A table of all points, one of slopes, and a line on the longer run."""
    rows = []
    for name, points in found.items():
        x = [float(size) for size in points]
        for what, unit in (("seconds", "s"), ("mib", "MiB")):
            y = [point[what] for point in points.values()]
            whole, last = slopes(x, y)
            values = ", ".join(f"{value:.2f}" if unit == "s" else f"{value:.0f}" for value in y)
            rows.append([name, ", ".join(points), f"{values} {unit}", f"{whole:.2f}", f"{last:.2f}"])
    yield from table(["grows", "x", "y", "slope", "last"], rows)
    resident = longer["resident"]
    tenth = resident[math.ceil(len(resident) / 10) - 1]
    yield ""
    yield f"longer run: {tenth:.0f} MiB resident after a tenth of {len(resident)} iterations, {resident[-1]:.0f} after"


def draw(found: dict[str, dict[str, dict]], path: Path) -> None:
    """Seconds above, memory below, a column to each sweep, with a dotted line of slope 1 through the last point."""
    figure, axes = plt.subplots(2, len(found), figsize=(3.2 * len(found), 5.6), layout="constrained", squeeze=False)
    for column, (name, points) in zip(axes.T, found.items(), strict=True):
        x = np.array([float(size) for size in points])
        for ax, what, label in zip(column, ("seconds", "mib"), ("seconds per iteration", "MiB"), strict=True):
            y = np.array([point[what] for point in points.values()])
            ax.loglog(x, y, "o-", label="measured")
            ax.loglog(x, y[-1] * x / x[-1], ":", color="grey", label="linear")
            ax.set(xlabel=name, ylabel=label, title=f"slope {slopes(list(x), list(y))[0]:.2f}")
            ax.xaxis.set(major_locator=ticker.FixedLocator(x), major_formatter=ticker.EngFormatter(places=0, sep=""))
            ax.yaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_minor_locator(ticker.NullLocator())
    axes[0, 0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/growth"))
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), metavar="SWEEP")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tiny", action="store_true", help="two points of a tiny model in the place of each sweep")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        fields = json.loads(args.point)
        iterations, shape = fields.pop("iterations"), Shape(**fields.pop("shape"))
        print(json.dumps(measure(Run(shape=shape, **fields), iterations)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, dict]] = {}
    for name in args.sweeps:
        points = {1: TINY, 2: replace(TINY, response=8)} if args.tiny else SWEEPS[name]
        for x, run in points.items():
            found.setdefault(name, {})[str(x)] = in_a_process(run, ITERATIONS, args.threads)
            print(name, x, json.dumps(found[name][str(x)]), flush=True)
    longer = in_a_process(TINY if args.tiny else replace(BASE, batch=4, rollout_batch_size=16), LONG, args.threads)
    (args.out / "growth.json").write_text(json.dumps({"sweeps": found, "longer": longer}, indent=1) + "\n")
    draw(found, args.out / "growth.png")
    print("\n".join(report(found, longer)))


if __name__ == "__main__":
    main()
