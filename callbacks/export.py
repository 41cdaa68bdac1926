"""The trained model as a Hugging Face folder: the last one, and the best one of a run that knows which is the best."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from ..checkpointing import beside, remove, take_name
from ..hub import PushError, check_push, push
from ..model_card import CardFacts, composed, held_out, write_card
from ..provenance import collect
from ._shared import final_metrics
from .controllers import EMAWeights
from .provenance import Provenance
from .rng_state import collect_state, restore_state

BEST = "best"


class HuggingFaceExport(L.Callback):
    """Write the model with `pl_module.save_pretrained` when training has ended, with a model card (`README.md`).

    Where the run's ModelCheckpoint has a `monitor`, each new best model is also written to `best/`, as soon as its
    checkpoint is: `--checkpoint.monitor val/reward --checkpoint.mode max`. A resumed run knows what is in `best/`.

    A fit that an exception, Ctrl-C or SIGTERM ends exports nothing more: Lightning then never calls `on_fit_end`, and a
    half trained model cannot pass for the finished one.

    The card tells method, data, metrics before and after (before: if the sanity check was whole, `num_sanity_val_steps:
    -1`), command, versions, limits and licence. A `README.md` that somebody else wrote, or whose first lines were
    changed so, stays.

    Args:
        dirname: folder in the trainer's `default_root_dir` to write to.
        lora: of a module with LoRA: `merged` writes a whole model, `adapter` only the adapter, for peft.
        best: write `best/`, too, if there is a monitor. Each new best costs the time to write the model once.
        push_to_hub: upload to this repository on the Hugging Face hub, `owner/name`, when training has ended: the best
            model if there is one, else the last. Should that fail there is a warning, and the folder stays.
        private: of a new repository on the hub.
        license: the licence that the card states, such as `apache-2.0`; None takes that of the base model's card.
    """

    def __init__(
        self,
        dirname: str = "model",
        lora: Literal["merged", "adapter"] = "merged",
        best: bool = True,
        push_to_hub: str | None = None,
        private: bool = True,
        license: str | None = None,
    ) -> None:
        if dirname == BEST:
            raise ValueError(f"`dirname` must be another name than `{BEST}`, where the best model is written.")
        self.dirname, self.lora, self.best = dirname, lora, best
        self.push_to_hub, self.private, self.license = push_to_hub, private, license
        self._exported: list[Any] | None = None  # path and score of the checkpoint whose model is in best/
        self._before: dict[str, float] = {}
        self._validated_at = -1  # the global step
        self._loaded = self._begun = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._loaded = self._begun = False
        if self.lora == "adapter" and not pl_module.hparams.get("lora_r"):
            raise ValueError("`HuggingFaceExport(lora=adapter)`: there will be no adapter, because `lora_r` is 0.")
        if self.lora == "merged" and pl_module.hparams.get("load_in_4bit"):
            raise ValueError(
                "`HuggingFaceExport(lora=merged)`: with `load_in_4bit` there will be no weights that an adapter could "
                "be merged into. Set `lora: adapter`."
            )
        if self.push_to_hub is not None and trainer.is_global_zero:
            check_push(self.push_to_hub)

    # --- what was measured of the model -------------------------------------------------------------------------------

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.num_sanity_val_steps == float("inf"):
            self._before = held_out(final_metrics(trainer))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated_at = trainer.global_step

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # For the card that `train.py export` writes.
        checkpoint["measured"] = {"metrics": self._measured(trainer), "before": self._before}

    def _measured(self, trainer: L.Trainer) -> dict[str, float]:
        """The held-out metrics of the model as it is now; none if the last validation was of an earlier one."""
        metrics = final_metrics(trainer)
        return held_out(metrics) if self._validated_at == trainer.global_step else {}

    # --- the best model -----------------------------------------------------------------------------------------------
    # Checkpoints are written by callbacks that Lightning calls last, so a new one is seen in the hook after that. No
    # step lies between the two: the model is still the checkpoint's.

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._export_new_best(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._export_new_best(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._export_new_best(trainer, pl_module)
        root = Path(trainer.default_root_dir)
        self._write(trainer, pl_module, root / self.dirname, "It is the model at the end of the training.")
        if self.push_to_hub is not None and trainer.is_global_zero:
            self._push(root / (self.dirname if self._exported is None else BEST))

    def _export_new_best(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        keeper, best = best_checkpoint(trainer) if self.best else (None, None)
        if not self._begun:
            self._begun = True
            if not self._loaded:  # a best of before this callback was there: its model is gone
                self._exported = best
        if best is None or best == self._exported:
            return
        folder = Path(trainer.default_root_dir) / BEST
        partial = beside(folder, "partial")
        if trainer.is_global_zero:
            remove(partial)
        words = f"It is the model with the best `{keeper.monitor}` ({keeper.mode}): {best[1]:.4g}"
        state = collect_state()
        with averaged(trainer, pl_module):
            self._write(trainer, pl_module, partial, f"{words}, at optimizer step {trainer.global_step}.")
        restore_state(state)
        if trainer.is_global_zero:
            take_name(partial, folder)
        self._exported = best

    def state_dict(self) -> dict[str, Any]:
        return {"exported": self._exported, "best": self.best, "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict.get("before", {})
        # Where the state lags behind the ModelCheckpoint's, the checkpoint is itself the best one, and is exported now.
        self._loaded = state_dict.get("best", False)
        self._exported = state_dict.get("exported")

    # --- writing ------------------------------------------------------------------------------------------------------

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path, which: str) -> None:
        # On every rank: gathering sharded parameters takes them all. The module writes on rank zero only.
        options = {} if self.lora == "merged" else {"merge": False}
        metrics = self._measured(trainer)
        pl_module.save_pretrained(folder, **options)
        if not trainer.is_global_zero:
            return
        facts = CardFacts(
            name=(self.push_to_hub or Path(trainer.default_root_dir).resolve().name).rpartition("/")[2],
            module=type(pl_module).__name__,
            settings={**pl_module.hparams, **composed(pl_module)},
            adapter=self.lora == "adapter",
            run=run_facts(trainer),
            metrics=metrics,
            before=self._before,
            which=which,
            config=config_text(trainer),
            license=self.license,
            repo=self.push_to_hub,
        )
        write_card(folder, facts)

    def _push(self, folder: Path) -> None:
        try:
            rank_zero_info(f"Pushed to {push(folder, self.push_to_hub, self.private)}")
        except PushError as error:
            rank_zero_warn(str(error))


@contextmanager
def averaged(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """The module with averaged weights in it, as the last validation saw it and the checkpoint has it."""
    # When the training has ended the module has them already.
    averages = [c for c in trainer.callbacks if isinstance(c, EMAWeights | WeightAveraging) and trainer.training]
    for average in averages:
        average.on_validation_start(trainer, pl_module)
        average.on_validation_epoch_start(trainer, pl_module)
    yield
    for average in averages:
        average.on_validation_epoch_end(trainer, pl_module)
        average.on_validation_end(trainer, pl_module)


def best_checkpoint(trainer: L.Trainer) -> tuple[ModelCheckpoint | None, list[Any] | None]:
    """The (first) ModelCheckpoint with a monitor, and path and score of its best checkpoint; None if there is none."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            score = callback.best_model_score  # none of a best that was loaded from a run in another folder
            return callback, None if score is None else [callback.best_model_path, float(score)]
    return None, None


def run_facts(trainer: L.Trainer) -> dict[str, Any]:
    """What the Provenance callback has found; without one it is found now."""
    for callback in trainer.callbacks:
        if isinstance(callback, Provenance) and callback.record:
            return callback.record
    return collect(data=getattr(trainer, "datamodule", None), world_size=trainer.world_size)


def config_text(trainer: L.Trainer) -> str:
    """The config.yaml that the command line has written for this run."""
    path = Path(trainer.default_root_dir, "config.yaml")
    by_command = any(isinstance(callback, SaveConfigCallback) for callback in trainer.callbacks)
    return path.read_text(encoding="utf-8") if by_command and path.exists() else ""
