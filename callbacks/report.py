"""Before and after PPO, on a page: goals, plots, texts, run facts."""

import json
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data.distributed import DistributedSampler

from ._shared import (
    Columns,
    final_metrics,
    gather_objects,
    interleave,
    peak_memory_gib,
    wall_time,
    write_atomically,
)
from .plots import save_plots
from .rendering import render
from .scorecard import Targets, common_prompts, evaluate, verdict

_HISTORY = ("rollout/", "policy/", "value/")


class PPOReport(L.Callback):
    """Write a report on a PPO run: which goals it met, how it went, what the texts look like now.

    The validation that Lightning runs before training as its sanity check is the baseline ("before"), so the trainer
    needs `num_sanity_val_steps: -1`; the last validation is "after". Baseline and history are kept in checkpoints: the
    report of a resumed run covers the whole run. It goes to the trainer's `default_root_dir`, its plots to `plots/`
    there.

    Args:
        filename: name of the Markdown file.
        prompts_in_table: how many held-out prompts to show with their responses before and after.
        min_reward_gain: goal: by how much the mean held-out reward rises, in standard deviations. Judged on the smaller
            of two readings: the plain difference (the reward model's normaliser gives reference texts a standard
            deviation of 1) and the difference divided by the standard deviation of the samples before.
        gold: name of a reward component that training does not optimise, such as "reward/vader"; without it the row is
            left out.
        min_gold_gain: goal: by how much the mean gold score rises.
        max_kl: goal: upper bound of the mean sequence KL to the reference after training, in nats.
        min_unique: goal: smallest share of different responses.
        min_distinct_share: goal: smallest share of its value before that distinct-2 keeps.
        reward_model_metrics: path of the `summary.json` that `StageSummary` wrote in the reward model's stage; adds its
            agreement to the goals.
        min_agreement: goal: smallest agreement of the reward model with its held-out pairs.
    """

    def __init__(
        self,
        filename: str = "report.md",
        prompts_in_table: int = 12,
        min_reward_gain: float = 1.5,
        gold: str | None = None,
        min_gold_gain: float = 0.3,
        max_kl: float = 15.0,
        min_unique: float = 0.9,
        min_distinct_share: float = 0.8,
        reward_model_metrics: str | None = None,
        min_agreement: float = 0.79,
    ) -> None:
        self.filename = filename
        self.prompts_in_table = prompts_in_table
        self.reward_model_metrics = reward_model_metrics
        self.targets = Targets(
            min_reward_gain, gold, min_gold_gain, max_kl, min_unique, min_distinct_share, min_agreement
        )
        self.before: Columns | None = None
        self.after: Columns | None = None
        self.history: list[dict[str, float]] = []
        self._batch_rows: list[dict[str, Any]] = []
        self._validated = False
        self._earlier_seconds = 0.0
        self._started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "after": self.after, "history": self.history, "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.after = state_dict["before"], state_dict["after"]
        self.history, self._earlier_seconds = state_dict["history"], state_dict["seconds"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._started = time.monotonic()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._batch_rows = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit" and isinstance(outputs, dict) and "response" in outputs and dataloader_idx == 0:
            columns = {name: _plain_list(column) for name, column in outputs.items()}
            self._batch_rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        samples = as_columns(merge_ranks(gather_objects(self._batch_rows), held_out_size(trainer)))
        self._batch_rows = []
        if not trainer.sanity_checking:
            self.after, self._validated = samples, True
        elif self.before is None and trainer.global_step == 0:
            # A resumed run, too, begins with a sanity check, but its model is no longer the one before training.
            self.before = samples

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning keeps showing the last validation's metrics; only new ones belong to this iteration.
        wanted = (*_HISTORY, "val/") if self._validated else _HISTORY
        metrics = {name: value for name, value in final_metrics(trainer).items() if name.startswith(wanted)}
        self.history.append({"iteration": trainer.current_epoch, **metrics})
        self._validated = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        root = Path(trainer.default_root_dir)
        before, after = common_prompts(self.before, self.after) if self.after else (None, None)
        goals = evaluate(before, after, self.targets, self._reward_model()) if after else []
        plots = save_plots(root / "plots", before, after, self.history)
        figures = [(caption, path.relative_to(root).as_posix()) for caption, path in plots]
        text = render(goals, before, after, figures, self._facts(), self.prompts_in_table)
        write_atomically(root / self.filename, text)
        print(f"{verdict(goals) if goals else 'No held-out samples to judge.'} Report: {root / self.filename}")

    def _seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._started

    def _reward_model(self) -> dict[str, float] | None:
        if self.reward_model_metrics is None:
            return None
        path = Path(self.reward_model_metrics)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _facts(self) -> dict[str, str]:
        peak, kl = peak_memory_gib(), [row["rollout/kl"] for row in self.history if "rollout/kl" in row]
        facts = {
            "iterations": str(len(self.history)),
            "held-out prompts": str(len(self.after["prompt"]) if self.after else 0),
            "held-out prompts before": str(len(self.before["prompt"]) if self.before else 0),
            "highest KL of an iteration's rollouts": f"{max(kl):.2f} nats" if kl else "–",
            "wall time": wall_time(self._seconds()),
            "peak memory of the process": f"{peak:.2f} GiB" if peak is not None else "–",
        }
        return facts | {name: _version(name) for name in ("torch", "lightning", "transformers")}


def merge_ranks(parts: list[list[dict]], size: int | None) -> list[dict]:
    """All ranks' rows in the order of the data.

    Args:
        parts: each rank's rows.
        size: length of the data set if a distributed sampler dealt it out; what is beyond it are padded repeats.
    """
    prompts = [[row.get("prompt") for row in part] for part in parts]
    if all(each == prompts[0] for each in prompts):  # one rank, or every rank saw everything
        return parts[0]
    return interleave(parts)[:size]


def held_out_size(trainer: L.Trainer) -> int | None:
    """Length of the validation data set, if a distributed sampler deals it out."""
    loaders = trainer.val_dataloaders
    loader = loaders[0] if isinstance(loaders, list) else loaders
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        return len(loader.dataset)
    return None


def as_columns(rows: list[dict]) -> Columns | None:
    """Rows as columns; None if there are no rows."""
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else None


def _plain_list(column: Any) -> list:
    if hasattr(column, "tolist"):
        return column.tolist()
    return [value.item() if hasattr(value, "item") else value for value in column]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
