"""The last checkpoint is the last one, the best ones were measured."""

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_rlhf.callbacks.checkpoint import RunCheckpoint


@pytest.fixture
def saved(fit, tmp_path):
    """Fits with a RunCheckpoint; returns it, and the epoch of each file."""

    def run(scores, ckpt_path=None, trainer=None, **options):
        keeper = RunCheckpoint(tmp_path / "kept", "{epoch}", **(dict(save_on_train_epoch_end=True) | options))
        module, _ = fit([], max_epochs=0)
        step = module.validation_step

        def validation_step(batch, batch_idx):
            module.log("val/score", scores[module.current_epoch], batch_size=1)
            return step(batch, batch_idx)

        module.validation_step = validation_step
        settings = dict(max_epochs=len(scores), enable_checkpointing=True) | (trainer or {})
        fit([keeper], module=module, ckpt_path=ckpt_path, **settings)
        files = sorted((tmp_path / "kept").glob("*.ckpt"))
        return keeper, {file.stem: torch.load(file, weights_only=True)["epoch"] for file in files}

    return run


BEST = dict(monitor="val/score", mode="max", save_last=True)


def test_the_last_checkpoint_is_of_the_last_epoch(saved):
    keeper, epochs = saved([0.1, 0.5, 0.2, 0.3], **BEST)
    assert epochs == {"epoch=1": 1, "last": 3}
    assert keeper.best_model_score == 0.5
    assert keeper.last_model_path.endswith("last.ckpt")


def test_the_last_checkpoint_is_as_seldom_as_asked_for_and_of_the_end(saved):
    assert saved([0.1, 0.5, 0.2, 0.1, 0.3], every_n_epochs=2, **BEST)[1] == {"epoch=1": 1, "last": 5}


def test_the_last_step_has_a_checkpoint(saved):
    options = dict(save_last=True, every_n_train_steps=4)
    keeper, _ = saved([0.1, 0.5, 0.2], **options)  # two steps an epoch
    assert torch.load(keeper.last_model_path, weights_only=True)["global_step"] == 6


def test_without_save_last_there_is_none(saved):
    assert saved([0.1, 0.5, 0.2], **(BEST | dict(save_last=False)))[1] == {"epoch=1": 1}


def test_with_links_the_last_is_what_was_saved_last(saved):
    assert saved([0.1, 0.5, 0.2], **(BEST | dict(save_last="link")))[1] == {"epoch=1": 1, "last": 1}


def test_where_it_saves_after_validation(saved):
    options = BEST | dict(save_on_train_epoch_end=False)
    assert saved([0.1, 0.5, 0.2], **options)[1] == {"epoch=1": 1, "last": 2}


def test_without_a_monitor_it_is_lightnings(saved):
    assert saved([0.1, 0.5, 0.2], save_last=True)[1] == {"epoch=2": 2, "last": 2}


def test_only_epochs_that_were_validated_count(saved):
    keeper, epochs = saved([9, 0.2, 9, 0.5, 9], trainer=dict(check_val_every_n_epoch=2), save_top_k=4, **BEST)
    assert epochs == {"epoch=1": 1, "epoch=3": 3, "last": 4}
    assert sorted(float(score) for score in keeper.best_k_models.values()) == pytest.approx([0.2, 0.5])


def test_a_monitor_of_the_training_counts_at_every_epoch(saved):
    options = dict(monitor="rollout/reward", mode="max", save_last=True, save_top_k=4)
    epochs = saved([1, 1, 1], trainer=dict(check_val_every_n_epoch=2), **options)[1]
    assert epochs == {"epoch=0": 0, "epoch=1": 1, "epoch=2": 2, "last": 2}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_goes_on_from_the_last_epoch_and_knows_the_best(saved, tmp_path):
    saved([0.1, 0.5, 0.2], **BEST)
    keeper, epochs = saved([9, 9, 9, 0.3], ckpt_path=tmp_path / "kept/last.ckpt", **BEST)
    assert epochs == {"epoch=1": 1, "last": 3}
    assert keeper.best_model_score == 0.5


class Lines(DummyLogger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step=None):
        self.lines.append((step, metrics))


def told_at_saves(fit, tmp_path, monkeypatch, **options):
    """What loggers were told in a run of three epochs of two steps; how many lines there were at each checkpoint."""
    lines, counts = Lines(), {}
    write = RunCheckpoint._save_checkpoint

    def count(keeper, trainer, path):
        counts.setdefault(trainer.global_step, len(lines.lines))
        write(keeper, trainer, path)

    monkeypatch.setattr(RunCheckpoint, "_save_checkpoint", count)
    fit([RunCheckpoint(tmp_path / "kept", **options)], max_epochs=3, logger=lines, enable_checkpointing=True)
    return lines.lines, counts


@pytest.mark.parametrize(
    "options",
    [
        dict(save_on_train_epoch_end=True),
        dict(save_on_train_epoch_end=False),
        dict(every_n_train_steps=2),
        BEST | dict(save_on_train_epoch_end=True, monitor="val/reward"),
        BEST | dict(save_on_train_epoch_end=False, monitor="val/reward"),
        BEST | dict(save_on_train_epoch_end=False, monitor="val/reward", every_n_train_steps=2),
    ],
)
def test_an_epochs_figures_are_logged_before_it_is_saved(options, fit, tmp_path, monkeypatch):
    lines, counts = told_at_saves(fit, tmp_path, monkeypatch, **options)
    per_epoch = [{"train/loss", "policy/clip_fraction"}] * 2 + [{"val/reward"}, {"rollout/reward", "rollout/kl"}]
    assert [set(metrics) - {"epoch"} for _, metrics in lines] == per_epoch * 3
    assert [step for step, _ in lines] == [0, 1, 1, 1, 2, 3, 3, 3, 4, 5, 5, 5]
    assert counts == {2: 4, 4: 8, 6: 12}


def test_within_an_epoch_it_saves_at_once(fit, tmp_path, monkeypatch):
    counts = told_at_saves(fit, tmp_path, monkeypatch, every_n_train_steps=3, save_last=True)[1]
    assert counts == {3: 4, 6: 12}
