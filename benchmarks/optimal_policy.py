"""Every method's path of expected reward against KL, the curve that no policy can cross, and where theory says it ends.

    python benchmarks/optimal_policy.py                        # all methods, seeds 0 1 2; some 15 minutes on one core
    python benchmarks/optimal_policy.py --methods PPO GRPO --seeds 0 --out runs/two.png

For each seed the language of `enumerable_toy.py` gets its own rewards and reference. The figure shows the first seed;
the titles give the largest total variation to the theoretical end over all seeds. Exit code 1 if one is above 0.02.
"""

import argparse
import logging
import sys
from pathlib import Path

import lightning as L
import torch
from enumerable_toy import Point, Toy, log_distribution
from matplotlib.figure import Figure
from torch import Tensor
from toy_methods import METHODS, Method

LIMIT = 0.02


class Trace(L.Callback):
    """Where the policy stands, every so many optimizer steps."""

    def __init__(self, toy: Toy, end: Tensor, every: int = 16) -> None:
        self.toy, self.end, self.every = toy, end, every
        self.points = [toy.locate(toy.reference, end)]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.global_step % self.every == 0:
            self.points.append(self.toy.locate(log_distribution(pl_module.policy), self.end))


def draw(axes, toy: Toy, name: str, method: Method, path: list[Point], distances: list[float]) -> None:
    """One method."""
    curve = [toy.locate(toy.optimum(beta)) for beta in torch.logspace(-1.2, 2, 200).tolist()]
    end = toy.locate(method.end(toy))
    axes.plot([p.kl for p in curve], [p.reward for p in curve], color="0.7", label="best reward for a KL")
    axes.plot([p.kl for p in path], [p.reward for p in path], "-", color="tab:blue", lw=1.2, label="the run")
    axes.plot(path[-1].kl, path[-1].reward, "o", color="tab:blue", ms=5)
    axes.plot(end.kl, end.reward, "*", color="tab:red", ms=13, mfc="none", label="the end in theory")
    axes.set_title(f"{name}: {max(distances):.4f}" if max(distances) >= 1e-4 else f"{name}: < 0.0001", fontsize=9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/optimal_policy.png"))
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # tensors of a few hundred numbers
    columns = min(4, len(args.methods))
    rows = -(-len(args.methods) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    worst = 0.0
    for axes, name in zip(grid, args.methods, strict=False):
        method, distances = METHODS[name], []
        for seed in args.seeds:
            toy = Toy(seed)
            end = method.end(toy)
            trace = Trace(toy, end)
            stop = toy.locate(method.run(toy, seed, [trace]), end)
            distances.append(stop.distance)
            print(f"{name}, seed {seed}: {stop}; theory: {toy.locate(end, end)}", flush=True)
            if seed == args.seeds[0]:
                shown = toy, trace.points
        draw(axes, shown[0], name, method, shown[1], distances)
        worst = max(worst, *distances)
    for axes in grid[len(args.methods) :]:
        axes.remove()
    figure.supxlabel("KL to the reference (nats)", fontsize=9)
    figure.supylabel("expected reward", fontsize=9)
    grid[0].legend(frameon=False, fontsize=7, loc="lower right")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150)
    print(f"largest total variation to the theoretical end: {worst:.4f}; figure: {args.out}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
