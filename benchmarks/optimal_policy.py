"""PPO's path of expected reward against KL, and the curve that no policy can cross.

    python benchmarks/optimal_policy.py --seeds 0 1 2 --iterations 400 --out runs/optimal_policy.png

For each seed the language of `enumerable_toy.py` gets its own rewards and reference. The curve is π* for every β; PPO
must end on it, at the point of its own β. Some 80 seconds a seed on one core.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
from enumerable_toy import Point, Toy, log_distribution, train
from matplotlib.figure import Figure


class Trace(L.Callback):
    """Where the policy stands after each iteration."""

    def __init__(self, toy: Toy) -> None:
        self.toy, self.points = toy, [toy.locate(toy.reference)]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.points.append(self.toy.locate(log_distribution(pl_module.policy)))


def draw(axes, toy: Toy, path: list[Point]) -> None:
    """One seed."""
    curve = [toy.locate(toy.optimum(beta)) for beta in torch.logspace(-1.2, 2, 200).tolist()]
    best = toy.locate(toy.optimum())
    axes.plot([p.kl for p in curve], [p.reward for p in curve], color="0.6", label="optimum, every β")
    axes.plot([p.kl for p in path], [p.reward for p in path], ".-", color="tab:blue", ms=3, lw=0.8, label="PPO")
    axes.plot(best.kl, best.reward, "*", color="tab:red", ms=12, label=f"optimum, β = {toy.beta:g}")
    axes.set_xlabel("KL to the reference (nats)")
    axes.set_title(f"total variation {path[0].distance:.2f} → {path[-1].distance:.4f}", fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/optimal_policy.png"))
    args = parser.parse_args()
    figure = Figure(figsize=(4 * len(args.seeds), 3.6), layout="constrained")
    for axes, seed in zip(figure.subplots(1, len(args.seeds), squeeze=False)[0], args.seeds, strict=True):
        toy = Toy(seed)
        path = Trace(toy)
        end = train(toy, seed, args.iterations, callbacks=[path])
        draw(axes, toy, path.points)
        print(f"seed {seed}: {end}, optimum {toy.locate(toy.optimum())}")
    figure.axes[0].set_ylabel("expected reward")
    figure.axes[0].legend(frameon=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
