import pytest
from lightning.pytorch.loggers import WandbLogger
from offline_wandb import OfflineRun

from lightning_rlhf.callbacks.wandb_axes import WandbAxes


@pytest.fixture
def run(fit, tmp_path, monkeypatch):
    """Fits offline; the module and what W&B holds of the run."""
    for name, value in {"WANDB_SILENT": "true", "WANDB_MODE": "offline", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)

    def run(callbacks, module=None, **options):
        logger = WandbLogger(offline=True, save_dir=tmp_path, project="test")
        module, _ = fit(callbacks, module=module, logger=logger, **options)
        logger.experiment.finish()
        return module, OfflineRun(tmp_path)

    return run


@pytest.fixture
def on_policy(fit):
    """A module that logs what on-policy modules log."""
    fake = type(fit([], max_epochs=1)[0])

    class OnPolicy(fake):
        samples = {}  # noqa: RUF012

        def on_train_epoch_end(self):
            self.log("progress/iteration", float(self.current_epoch + 1))

        def validation_step(self, batch, batch_idx):
            columns = super().validation_step(batch, batch_idx)
            self.log("val/kl", 0.25 * self.global_step)
            self.log("val/reward/vader", 0.1)
            return columns

    return OnPolicy


def test_each_name_has_its_own_axis_and_summary(run, on_policy):
    _, wandb = run([WandbAxes()], module=on_policy())
    axes = {name: metric.step_metric for name, metric in wandb.metrics.items()}
    for name in ("rollout/kl", "val/reward", "val/win_rate_low", "time/rollout", "throughput/mfu", "memory/peak_gib"):
        assert axes[name] == "progress/iteration"
    assert axes["rollout/reward/vader"] == axes["val/reward/vader"] == "progress/iteration"
    assert axes["samples/rollouts"] == axes["tokens/view"] == "progress/iteration"
    for name in ("policy/loss", "value/explained_variance", "train/loss", "policy/grad_norm", "val/loss"):
        assert axes[name] == "trainer/global_step"
    assert not {name for name in axes if "*" in name} - {"*"}  # of several patterns W&B takes any: "*" is Lightning's
    assert wandb.metrics["val/reward"].summary.max
    assert wandb.metrics["val/loss"].summary.min
    assert not wandb.metrics["rollout/reward"].summary.max


def test_axes_win_over_lightnings_in_what_is_logged(run, on_policy):
    _, wandb = run([WandbAxes()], module=on_policy(), max_epochs=3)
    # rewards of the held-out prompts are level + 0..3, levels the optimizer steps 2, 4, 6
    assert wandb.series("progress/iteration", "val/reward") == [(1, 3.5), (2, 5.5), (3, 7.5)]
    assert wandb.series("progress/iteration", "val/reward/vader") == [(i, pytest.approx(0.1)) for i in (1, 2, 3)]
    assert wandb.series("progress/iteration", "rollout/reward") == [(1, 0.5), (2, 1.5), (3, 2.5)]
    assert [x for x, _ in wandb.series("trainer/global_step", "policy/clip_fraction")] == list(range(6))
    assert wandb.summary["val/reward"] == {"max": 7.5}
    assert wandb.summary["rollout/reward"] == 2.5


def test_frontier(run, on_policy):
    _, wandb = run([WandbAxes()], module=on_policy(), max_epochs=3, check_val_every_n_epoch=2)
    assert wandb.series("frontier/kl", "frontier/reward") == [(0.0, 0.5), (2.0, 1.5), (4.0, 2.5)]
    assert wandb.series("frontier/val_kl", "frontier/val_reward") == [(1.0, 5.5)]
    assert wandb.metrics["frontier/reward"].step_metric == "frontier/kl"
    assert wandb.metrics["frontier/val_reward"].step_metric == "frontier/val_kl"
    assert wandb.metrics["frontier/kl"].options.hidden


def test_modules_without_rollouts_are_drawn_over_steps(run, fit):
    fake = type(fit([], max_epochs=1)[0])

    class Offline(fake):
        def on_train_epoch_start(self):
            pass

    _, wandb = run([WandbAxes()], module=Offline(), max_epochs=1)
    assert wandb.metrics["val/reward"].step_metric == "trainer/global_step"
    assert "progress/iteration" not in wandb.names() | wandb.metrics.keys()
    assert not {name for name in wandb.names() if name.startswith("frontier")}


def test_nothing_is_drawn_or_learned(run, fit, on_policy):
    bare, _ = fit([], module=on_policy())
    watched, _ = run([WandbAxes()], module=on_policy())
    assert watched.trace == bare.trace


def test_other_loggers_are_left_alone(fit, on_policy):
    fit([WandbAxes()], module=on_policy())


def test_a_service_that_is_gone_is_a_warning(fit, on_policy, tmp_path, monkeypatch):
    class Gone:
        def define_metric(self, *_, **__):
            raise ConnectionError("gone")

        log = define_metric

    class Logger(WandbLogger):
        experiment = Gone()
        log_metrics = log_hyperparams = lambda *_, **__: None

    with pytest.warns(UserWarning, match="W&B's run cannot be written"):
        fit([WandbAxes()], module=on_policy(), logger=Logger())
