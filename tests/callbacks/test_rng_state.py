import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlhf.callbacks import RNGState
from lightning_rlhf.callbacks.rng_state import collect_state, restore_state


def checkpoint(tmp_path):
    return ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)


@pytest.mark.parametrize("reload", [0, 1])
def test_resumed_run_equals_uninterrupted_run(fit, tmp_path, reload):
    options = {"max_epochs": 4, "reload_dataloaders_every_n_epochs": reload}
    whole, _ = fit([RNGState(), checkpoint(tmp_path)], enable_checkpointing=True, **options)
    resumed, _ = fit([RNGState()], ckpt_path=tmp_path / "epoch=1.ckpt", **options)
    # Per epoch: Python, NumPy and torch numbers, then two shuffled batches.
    assert len(whole.trace) == 4 * 3
    assert resumed.trace == whole.trace[6:]
    # Dropout draws inside the step: equal parameters say that it, too, continued.
    torch.testing.assert_close(resumed.linear.weight, whole.linear.weight, rtol=0, atol=0)


def test_without_it_a_resumed_run_differs(fit, tmp_path):
    whole, _ = fit([checkpoint(tmp_path)], max_epochs=3, enable_checkpointing=True)
    resumed, _ = fit([], max_epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.trace != whole.trace[6:]


def test_state_loads_with_weights_only(fit, tmp_path):
    fit([RNGState(), checkpoint(tmp_path)], max_epochs=1, enable_checkpointing=True)
    states = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"]["RNGState"]["ranks"]
    assert len(states) == 1
    assert {"python", "numpy", "torch"} <= set(states[0])


def test_collect_and_restore_round_trip():
    random.gauss(0, 1)  # leaves a second normal deviate waiting in Python's generator
    np.random.randn()  # and in NumPy's
    state = collect_state()
    first = random.gauss(0, 1), np.random.randn(), torch.rand(3).tolist()
    restore_state(state)
    assert (random.gauss(0, 1), np.random.randn(), torch.rand(3).tolist()) == first


def test_other_number_of_ranks_warns_and_restores_own_rank(fit):
    callback = RNGState()
    torch.manual_seed(5)
    states = [collect_state(), collect_state()]
    callback.load_state_dict({"ranks": states})
    with pytest.warns(UserWarning, match="2 ranks, this run has 1"):
        module, _ = fit([callback], max_epochs=1)
    torch.manual_seed(5)
    assert module.trace[0][2] == float(torch.rand(()))


def test_rank_beyond_checkpoint_keeps_seeded_state(fit):
    callback = RNGState()
    callback.load_state_dict({"ranks": []})
    with pytest.warns(UserWarning, match="keep their seeded state"):
        module, _ = fit([callback], max_epochs=1)
    assert module.trace == fit([], max_epochs=1)[0].trace
