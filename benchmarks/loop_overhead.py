"""What Lightning's loop adds to an iteration of PPO: the share of its seconds that no hand-written loop would take.

    python benchmarks/loop_overhead.py          # workload `ppo` of versus.py; some 2 minutes on 2 cores

Work is the rollout with its scoring, forward and backward passes, and the optimizer's own arithmetic with division and
clipping of gradients. The rest is the loop: hooks, callbacks, progress, fetching of minibatches, meters.
"""

import argparse
import importlib
import statistics
import time
from pathlib import Path

import lightning as L
import torch
from meters import Stopwatch
from versus import CASES, OWN, add_machine_arguments, jobs
from versus_own import make_data, make_module

ADAM = importlib.import_module("torch.optim.adam")  # torch.optim hides it


class Shares(L.Callback):
    """Seconds of each iteration, and those of them that are work."""

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self.iterations: list[tuple[float, float]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        own = ("on_train_epoch_start", "training_step", "on_before_optimizer_step", "configure_gradient_clipping")
        for place, names in ((pl_module, own), (trainer.strategy, ("backward",)), (ADAM, ("adam",))):
            for name in names:
                setattr(place, name, self.watch.around("work", getattr(place, name)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = time.perf_counter()
        self.iterations.append((now - self._start, self.watch.take()["work"]))
        self._start = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_machine_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.results, args.own_only = Path("runs/versus").resolve(), True
    job = jobs("ppo", args)[OWN]
    shares, original = Shares(), ADAM.adam
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(accelerator=args.accelerator, devices=1, max_epochs=job.total, callbacks=[shares],
                        logger=False, enable_checkpointing=False)  # fmt: skip
    trainer.fit(make_module(job), make_data(job))
    ADAM.adam = original
    measured = shares.iterations[job.warmup :]
    seconds, share = (statistics.median(column) for column in zip(*((t, 1 - w / t) for t, w in measured), strict=True))
    print(f"{CASES['ppo'].rows} responses: {seconds:.2f} s an iteration, {100 * share:.2f}% of it the loop")


if __name__ == "__main__":
    main()
