"""A record of what was run, with what, on what, and how it ended: run.json."""

import json
import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ..provenance import collect, masked
from ._shared import json_safe, peak_memory_gib, write_atomically

FILE = "run.json"


class Provenance(L.Callback):
    """Write `run.json` when a fit begins, and complete it when it ends, however it ends.

    It holds the command (secrets masked), versions, hardware, git state, a fingerprint of the data, seed, start, and
    `status`: `running`, then `finished`, `stopped` (Ctrl-C, or a signal) or `failed` with the first line of the error;
    from then on also seconds, iterations (finished epochs), optimizer steps and peak memory of rank zero's process and
    of its GPU. What is outermost is the latest session. A resumed run keeps the sessions before it in the list
    `sessions`, the oldest first; one of them that was still `running` was `killed`. A new run in an old folder drops
    them when its training begins.

    Lightning calls no callback when the process is killed, or when the flags are wrong: `status` is then `running`, or
    there is no file. A file that cannot be written is a warning.
    """

    def __init__(self) -> None:
        self.record: dict[str, Any] = {}
        """What run.json holds; on rank zero, from `setup` on."""
        self._path = Path(FILE)
        self._start = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Here, before models are loaded, for a run that fails there leaves a record, too. Data are read by now.
        if stage != "fit" or not trainer.is_global_zero:
            return
        self._path, self._start = Path(trainer.default_root_dir) / FILE, time.monotonic()
        seed = os.environ.get("PL_GLOBAL_SEED")
        facts = collect(
            data=getattr(trainer, "datamodule", None),
            seed=None if seed is None else int(seed),
            world_size=trainer.world_size,
        )
        self.record = {
            "status": "running",
            "module": type(pl_module).__name__,
            **facts,
            "resumed_from": None,
            "sessions": earlier_sessions(self._path),
        }
        self._write()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.record.get("status") == "running":  # not in a `validate` after the fit
            self.record["resumed_from"] = str(trainer.ckpt_path)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.record:
            if self.record["resumed_from"] is None:
                self.record["sessions"] = []
            self._write()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Last of all, so that the time of what other callbacks do in `on_fit_end` counts.
        if stage == "fit":
            self._complete(trainer, "finished")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        stopped = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        said = f"{type(exception).__name__}: {exception}".partition("\n")[0].removesuffix(": ")
        self._complete(trainer, "stopped" if stopped else "failed", masked(said))

    def _complete(self, trainer: L.Trainer, status: str, error: str | None = None) -> None:
        if self.record.get("status") != "running":
            return
        gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_initialized() else None
        self.record |= {
            "status": status,
            "error": error,
            "seconds": round(time.monotonic() - self._start, 3),
            "iterations": trainer.current_epoch,
            "optimizer_steps": trainer.global_step,
            "peak_memory_gib": peak_memory_gib(),
            "peak_gpu_memory_gib": gpu,
        }
        self._write()

    def _write(self) -> None:
        try:
            write_atomically(self._path, json.dumps(json_safe(self.record), indent=2) + "\n")
        except OSError as error:
            rank_zero_warn(f"`{self._path}` cannot be written: {error}")


def earlier_sessions(path: Path) -> list[dict[str, Any]]:
    """The sessions in a run.json, the oldest first; none if there is no such file, or it is not one."""
    try:
        last = json.loads(path.read_text(encoding="utf-8"))
        sessions = last.pop("sessions")
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return []
    return [*sessions, last | {"status": "killed" if last.get("status") == "running" else last.get("status")}]
