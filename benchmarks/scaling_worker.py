"""One process of the trainings that `scaling.py` starts; alone, or one of several under torchrun.

python scaling_worker.py FOLDER KIND NAME...        the results go to FOLDER/KIND-<world size>.json
"""

import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from communication_model import per_rollout, per_step
from memory_model import kv_cache, phases, static
from memory_probes import cache_bytes, saved_bytes, saved_formula
from meters import LiveBytes, Stopwatch, sent_bytes, size
from model_shapes import Run, Shape
from small_llama import make_data, make_module
from torch import Tensor

from lightning_rlhf.strategies import FSDP2Strategy

SMALL = Shape(layers=4, hidden=256, heads=8, kv_heads=4, head_dim=32, intermediate=1024, vocabulary=8192)
PPO = Run("ppo", SMALL, batch=8, prompt=64, response=32, rollout_batch_size=32, forward_batch_size=16)
RUNS = {
    "PPO": PPO,
    "PPO, per-token gathers": replace(PPO, unshard_rollouts=False),
    "PPO, value network": replace(PPO, value="network"),
    "PPO, bfloat16": replace(PPO, dtype="bfloat16"),
    "PPO, bf16-mixed": replace(PPO, mixed=True),
    "PPO, checkpointing": replace(PPO, gradient_checkpointing=True),
    "PPO, LoRA": replace(PPO, lora_r=8),
    "PPO, LoRA, bfloat16": replace(PPO, lora_r=8, dtype="bfloat16"),
    "PPO, LoRA, last layer": replace(PPO, lora_r=8, lora_last_layers=1),
    "SFT": replace(PPO, method="sft", prompt=0, response=96),
}
STEPS = 4  # in an SFT epoch; PPO has R / B
Row = dict[str, str | int | float]


class Meter(L.Callback):
    """Bytes sent and the most bytes of tensors between the hooks of a training, and what is there after a step."""

    def __init__(self) -> None:
        self.live = LiveBytes()
        self.sent: dict[str, list[int]] = {}
        self.peaks: dict[str, list[int]] = {}
        self.held: dict[str, int] = {}
        self._last_sent = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.live.__enter__()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.live.__exit__(None, None, None)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.live.add([*pl_module.parameters(), *frozen_parameters(pl_module), *states(trainer)])
        self._mark("between")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, i: int) -> None:
        self._mark("between" if i else "rollout")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, i: int
    ) -> None:
        self._mark("step")
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        self.held = {
            "weights": size(pl_module.parameters()),
            "gradients": size(p.grad for p in trained),
            "optimizer": size(states(trainer)),
            "frozen": size(frozen_parameters(pl_module)),
        }

    def _mark(self, what: str) -> None:
        if dist.is_initialized():
            dist.barrier()
        sent = sent_bytes()
        self.sent.setdefault(what, []).append(sent - self._last_sent)
        self.peaks.setdefault(what, []).append(self.live.peak)
        self._last_sent, self.live.peak = sent, 0


class Timer(L.Callback):
    """Seconds of the parts of each iteration, on this process."""

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self.iterations: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, part in {"roll_out": "sampling", "score": "scoring", "token_statistics": "scoring"}.items():
            setattr(pl_module, name, self.watch.around(part, getattr(pl_module, name)))
        if isinstance(trainer.strategy.model, torch.nn.parallel.DistributedDataParallel):
            trainer.strategy.model.register_comm_hook(trainer.world_size, self.watch.all_reduce)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watch.take()
        self._start = self._end = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, i: int
    ) -> None:
        self._end = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds = {"sampling": 0.0, "scoring": 0.0, "collectives": 0.0} | self.watch.take()
        total = self._end - self._start
        update = total - seconds["sampling"] - seconds["scoring"]
        tokens = pl_module.sum_over_ranks(torch.tensor(float(sum(pl_module.samples["length"])))).item()
        self.iterations.append(seconds | {"update": update, "total": total, "tokens": tokens})


def frozen_parameters(module: L.LightningModule) -> list[Tensor]:
    """Of PPO's reference and reward models, which are no submodules."""
    copy = getattr(getattr(module, "reference", None), "copy", None)
    terms = module.rewards.terms.values() if hasattr(module, "rewards") else []
    scorers = [scorer for term in terms if (scorer := getattr(term, "_scorer", None)) is not None]
    return [p for network in [*([] if copy is None else [copy]), *scorers] for p in network.parameters()]


def states(trainer: L.Trainer) -> list[Tensor]:
    """Of the optimizers."""
    return [v for o in trainer.optimizers for state in o.state.values() for v in state.values() if torch.is_tensor(v)]


def fit(run: Run, folder: Path, epochs: int, callback: L.Callback) -> None:
    """The training of a run."""
    strategy = FSDP2Strategy(unshard_rollouts=run.unshard_rollouts) if run.strategy == "fsdp2" else run.strategy
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=run.ranks,
        strategy=strategy,
        precision="bf16-mixed" if run.mixed else "32-true",
        max_epochs=epochs,
        gradient_clip_val=1.0,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make_module(run, folder), make_data(run, STEPS))


def row(name: str, run: Run, what: str, measured: float, formula: float) -> Row:
    """A line of the result, in bytes of this process."""
    return {"run": name, "strategy": run.strategy, "what": what, "measured": measured, "formula": formula}


def probe(name: str, run: Run, folder: Path) -> Iterable[Row]:
    """Bytes held, sent, and at the worst moments, of the second of two epochs, beside the formulas."""
    meter = Meter()
    fit(run, folder, 2, meter)
    expected = static(run)
    yield from (row(name, run, what, value, expected[what]) for what, value in meter.held.items())
    worst = {what: sum(parts.values()) for what, parts in phases(run).items()}
    yield row(name, run, "peak of an update", max(meter.peaks["step"]), worst["update"])
    if run.method == "ppo":
        peak = max(worst["sampling"], worst["scoring"])
        yield row(name, run, "peak of a rollout", meter.peaks["rollout"][-1], peak)
    if run.ranks > 1:
        yield row(name, run, "sent per step", statistics.median(meter.sent["step"]), sum(per_step(run, True).values()))
        if run.method == "ppo":
            yield row(name, run, "sent per rollout", meter.sent["rollout"][-1], sum(per_rollout(run).values()))


def saved(name: str, run: Run, folder: Path) -> Iterable[Row]:
    """Bytes that one micro-batch leaves for its backward pass, and of a rollout's cache."""
    yield row(name, run, "activations and logits", saved_bytes(run, folder), saved_formula(run))
    if run.method == "ppo":
        yield row(name, run, "KV cache", cache_bytes(run, folder), kv_cache(run))


def timed(name: str, run: Run, folder: Path) -> Iterable[Row]:
    """Medians of the iterations after the first."""
    timer = Timer()
    with timer.watch.on_collectives():
        fit(run, folder, 6, timer)
    later = timer.iterations[1:]
    medians = {part: statistics.median(iteration[part] for iteration in later) for part in later[0]}
    yield {"run": name, "strategy": run.strategy, "ranks": run.ranks} | medians


KINDS = {"probe": probe, "saved": saved, "timed": timed}


def main() -> None:
    """Each name is `<run>|<strategy>|<fields that differ, as JSON>`."""
    folder, kind, *names = sys.argv[1:]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    warnings.simplefilter("ignore")
    rows = []
    for name in names:
        title, strategy, fields = name.split("|")
        changes = json.loads(fields or "{}")
        if "shape" in changes:
            changes["shape"] = Shape(**changes["shape"])
        run = replace(RUNS[title], strategy=strategy, ranks=ranks, **changes)
        rows += KINDS[kind](title, run, Path(folder))
    if os.environ.get("RANK", "0") == "0":
        Path(folder, f"{kind}-{ranks}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
