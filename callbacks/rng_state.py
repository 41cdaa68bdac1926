"""Random number generators in the checkpoint. Lightning saves none of them."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ..ranks import of_all_ranks


class RNGState(L.Callback):
    """Save and restore the states of Python's, NumPy's and torch's generators, rank by rank.

    With it, a run resumed from a checkpoint written at the end of an epoch draws the same numbers as a run that was
    never stopped. Without it, a resumed run repeats the shuffles and the sampling noise of its first epochs. It holds
    for torch's CPU generator and the current CUDA device of each rank. Checkpoints from the middle of an epoch restore
    the generators, too, but Lightning does not restore the position in a shuffled DataLoader.

    On more ranks than the checkpoint was written with, the additional ranks keep the state they were seeded with.
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] | None = None
        self._restored = False

    def state_dict(self) -> dict[str, Any]:
        # Lightning calls this on every rank (Trainer.save_checkpoint -> dump_checkpoint), so gathering is safe; the
        # file is rank zero's.
        return {"ranks": of_all_ranks(collect_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["ranks"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here and not in `load_state_dict`: between the two Lightning runs the sanity check and builds the loaders,
        # which draw numbers that the uninterrupted run does not draw at this point.
        self._restored, ranks, self._loaded = self._loaded is not None, self._loaded, None
        if ranks is None:
            return
        if len(ranks) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint holds random states of {len(ranks)} ranks, this run has {trainer.world_size}: what "
                "draws from the global generators (dropout, code of yours) draws other numbers than an uninterrupted "
                "run. Ranks beyond the checkpoint's keep their seeded state."
            )
        if trainer.global_rank < len(ranks):
            restore_state(ranks[trainer.global_rank])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # An uninterrupted run makes a new iterator of the train loader after this hook, which draws from torch's
        # generator. Lightning >= 2.6 skips that in the first epoch after a resume (`is_resuming`) and uses the iterator
        # made before `on_train_start`, shuffled with numbers from before the restore. Lightning does not call this hook
        # when it resumes in the middle of an epoch, where the old iterator must stay.
        if self._restored and getattr(trainer.fit_loop, "is_resuming", False):
            trainer.fit_loop._resuming_from_checkpoint = False
        self._restored = False


def collect_state() -> dict[str, Any]:
    """This process's generators as tensors, numbers, strings and lists, which `torch.load(weights_only=True)` takes."""
    version, words, gauss_next = random.getstate()
    name, keys, position, has_gauss, cached_gauss = np.random.get_state()
    state = {
        "python": [version, list(words), gauss_next],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached_gauss)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_state(state: dict[str, Any]) -> None:
    """Set this process's generators to a state from `collect_state`."""
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    name, keys, position, has_gauss, cached_gauss = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached_gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
