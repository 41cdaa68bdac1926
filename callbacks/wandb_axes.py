"""Axes and summaries of the logged figures in Weights & Biases."""

from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger

from ..loggers import forgiving_io
from ._shared import final_metrics
from .validation_samples import finished_iterations

ITERATION, STEP = "progress/iteration", "trainer/global_step"
_SAMPLED = [
    *("reward", "reward_std", "kl", "kl_k3", "kl_per_token", "kl_k3_per_token", "entropy", "response_length"),
    *("eos_rate", "truncated_rate", "distinct_1", "distinct_2", "reward_length_correlation"),
]
BY_ITERATION = [
    *(f"{stage}/{name}" for stage in ("rollout", "val") for name in _SAMPLED),
    *(f"rollout/{name}" for name in ("groups_with_spread", "sampling_rounds", "pair_gap", "tied_pairs")),
    *("rollout/best_reward", "rollout/best_length"),
    *(f"val/{name}" for name in ("win_rate", "win_rate_low", "win_rate_high", "reference_reward", "kl_bound")),
    *(f"time/{name}" for name in ("rollout", "scoring", "update", "iteration")),
    *("throughput/tokens_per_second", "throughput/trained_tokens_per_second", "throughput/mfu", "memory/peak_gib"),
    *(f"progress/{name}" for name in ("episodes", "tokens", "optimizer_steps")),
    *("samples/rollouts", "samples/validation", "tokens/view"),
]
BY_STEP = [
    *(f"policy/{name}" for name in ("loss", "approx_kl", "clip_fraction", "ratio", "ratio_min", "ratio_max")),
    *(f"policy/{name}" for name in ("kl_coef", "entropy_coef", "first_ratio_error", "grad_norm")),
    *(f"value/{name}" for name in ("loss", "clip_fraction", "explained_variance", "grad_norm")),
    *("train/loss", "train/grad_norm"),
]
SUMMARIES = {"val/reward": "max", "val/win_rate": "max", "val/agreement": "max", "val/loss": "min"}
FRONTIER = {  # what is drawn over a KL: (its name as logged, that of its KL)
    "frontier/reward": ("rollout/reward", "rollout/kl"),
    "frontier/val_reward": ("val/reward", "val/kl"),
}


class WandbAxes(L.Callback):
    """Give each figure its x-axis in W&B, and draw reward against KL.

    What is measured once an iteration (`rollout/`, `val/`, `time/`, `throughput/`, `memory/`) is drawn over
    `progress/iteration`, what is measured at optimizer steps over `trainer/global_step`; modules without rollouts have
    only the latter. Summaries are the best `val/` figures, and else the last. `frontier/reward` and
    `frontier/val_reward` are drawn over the KL to the reference at which they were measured.

    Each name is defined by itself, and not as `rollout/*`: of several patterns that fit a name W&B takes any one, and
    Lightning has defined `*`.
    """

    def __init__(self) -> None:
        self._defined: set[str] = set()
        self._validated = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._defined, self._validated = set(), False
        rolls_out = hasattr(pl_module, "samples")
        if rolls_out:
            self._define(trainer, [ITERATION], None)
            self._define(trainer, BY_ITERATION, ITERATION)
            for name, (_, kl) in FRONTIER.items():
                x = frontier_axis(kl)
                self._define(trainer, [x], None, hidden=True)
                self._define(trainer, [name], x, step_sync=False)
        others = [name for name in SUMMARIES if name not in BY_ITERATION or not rolls_out]
        self._define(trainer, [*BY_STEP, *others], STEP)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not hasattr(pl_module, "samples"):
            return
        self._validated = True
        self._define_components(trainer, pl_module)
        for run in runs(trainer):  # W&B adds the last known iteration to what is logged next
            with forgiving_io("W&B's run", Exception):
                run.log({ITERATION: finished_iterations(trainer), STEP: trainer.global_step})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not hasattr(pl_module, "samples"):
            return
        self._define_components(trainer, pl_module)
        metrics = final_metrics(trainer)  # on all ranks
        row = {}
        for name, (reward, kl) in FRONTIER.items():
            # Lightning keeps showing the last validation's figures; only new ones belong to this iteration.
            if reward in metrics and kl in metrics and (self._validated or not reward.startswith("val/")):
                row |= {name: metrics[reward], frontier_axis(kl): metrics[kl]}
        self._validated = False
        for run in runs(trainer) if row else []:
            with forgiving_io("W&B's run", Exception):
                run.log(row | {STEP: trainer.global_step})

    def _define_components(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        components = [column for column in pl_module.samples if column.startswith("reward/")]
        self._define(trainer, [f"{stage}/{name}" for stage in ("rollout", "val") for name in components], ITERATION)

    def _define(
        self, trainer: L.Trainer, names: list[str], x: str | None, step_sync: bool = True, **options: Any
    ) -> None:
        new = [name for name in names if name not in self._defined]
        self._defined |= set(new)
        for run in runs(trainer):
            with forgiving_io("W&B's run", Exception):
                for name in new:
                    axis = {} if x is None else {"step_metric": x, "step_sync": step_sync}
                    run.define_metric(name, summary=SUMMARIES.get(name), **axis, **options)


def frontier_axis(kl: str) -> str:
    """The name under which a KL is logged beside the reward that is drawn over it."""
    return "frontier/val_kl" if kl.startswith("val/") else "frontier/kl"


def runs(trainer: L.Trainer) -> list[Any]:
    """The W&B runs of a trainer; none on other ranks than zero."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]
