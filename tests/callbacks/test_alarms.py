"""Each alarm on scripted figures: a sabotaged run triggers it, a healthy one does not, every option counts."""

import json
import math
import random
import types

import lightning as L
import pytest
import torch
from scipy.stats import linregress

from lightning_rlhf.callbacks.alarm import FILENAME, AlarmWarning
from lightning_rlhf.callbacks.alarms import (
    CriticAlarm,
    EntropyAlarm,
    EOSAlarm,
    KLAlarm,
    LengthAlarm,
    OveroptimizationAlarm,
    RatioAlarm,
    SpreadAlarm,
    is_exact,
    trend,
)


class Scripted(L.LightningModule):
    """Logs given figures: `figures` in each epoch, `held_out` at each evaluation."""

    def __init__(self, figures, held_out=None, **hparams):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        self.figures, self.held_out, self.epochs = figures, held_out or {}, []
        self.save_hyperparameters(hparams)

    def on_train_epoch_start(self):
        self.epochs.append(self.current_epoch)
        self.log_dict({name: values[self.current_epoch] for name, values in self.figures.items()})

    def training_step(self, batch, batch_idx):
        return self.linear(batch[0]).mean()

    def validation_step(self, batch, batch_idx):
        sane = self.trainer.sanity_checking
        self.log_dict({name: -99.0 if sane else values[self.current_epoch] for name, values in self.held_out.items()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def raised(fit, tmp_path):
    """Trains with an alarm on scripted figures; returns the iterations in which it was raised."""

    def run(alarm, figures, held_out=None, **options):
        count = len(next(iter(figures.values())))
        fit([alarm], max_epochs=count, module=Scripted(figures, held_out), **options)
        path = tmp_path / FILENAME
        return [json.loads(line)["iteration"] for line in path.read_text().splitlines()] if path.exists() else []

    return run


# alarm, figures of a healthy run, figures of a sabotaged run, where it is raised
RUNS = {
    "KL blow-up": (KLAlarm(), [0.0, 0.3, 1.2, 3.0, 5.0, 8.0, 11.2], [0.0, 1.0, 20.0, 51.0, 300.0], 3),
    "KL jumps": (KLAlarm(), [9, 9, 9, 9, 9, 20.0], [4.0, 4.0, 4.0, 4.0, 4.0, 16.1], 5),
    "KL below 0": (KLAlarm(), [0.0, -0.1, -0.9], [0.0, -0.1, -1.1], 2),
    "longer": (LengthAlarm(), [10.0, 15.0, 20.0, 12.0], [10.0, 15.0, 20.5, 30.0], 2),
    "shorter": (LengthAlarm(), [10.0, 7.0, 5.0], [10.0, 7.0, 4.9], 2),
    "entropy collapses": (EntropyAlarm(), [2.0, 1.5, 0.9, 0.41], [2.0, 1.5, 0.9, 0.39, 0.1], 3),
    "entropy near 0": (EntropyAlarm(), [0.05, 0.03, 0.021], [0.05, 0.03, 0.019], 2),
    "no EOS": (EOSAlarm(), [0.8, 0.3, 0.3, 0.5, 0.3], [0.8, 0.3, 0.3, 0.3], 3),
    "nothing has to end": (EOSAlarm(threshold=0.05), [0.1] * 4, [0.04] * 4, 2),
    "dead critic": (CriticAlarm(), [0.0, -0.3, 0.0, 0.01, 0.1, 0.0], [0.0, 0.0, -0.3, 0.04, 0.0, -0.1], 4),
    "no spread": (SpreadAlarm(), [0.9, 0.1, 0.1, 0.2, 0.1], [0.9, 0.5, 0.1, 0.0, 0.1], 4),
    "ratio": (RatioAlarm(), [0.0, 9e-4], [0.0, 1.1e-3], 1),
}


@pytest.mark.parametrize(("alarm", "healthy", "sabotaged", "where"), RUNS.values(), ids=RUNS)
def test_a_sabotaged_run_raises_it_and_a_healthy_one_does_not(raised, alarm, healthy, sabotaged, where):
    assert raised(alarm, {alarm.metric: healthy}) == []
    with pytest.warns(AlarmWarning, match=alarm.metric):
        assert raised(alarm, {alarm.metric: sabotaged}) == [where]


def test_no_rate_of_0_is_low_where_responses_never_ended(raised):
    assert raised(EOSAlarm(), {"rollout/eos_rate": [0.0] * 5}) == []


# options with which a run is judged otherwise than by the defaults, and its figures
OPTIONS = {
    "KL threshold": (KLAlarm, {"threshold": 7.0}, [0.0, 8.0]),
    "KL jump": (KLAlarm, {"jump": 2.0}, [6.0] * 5 + [13.0]),
    "KL lowest": (KLAlarm, {"lowest": -0.1}, [0.0, -0.2]),
    "length factor": (LengthAlarm, {"factor": 1.2}, [10.0, 13.0]),
    "entropy share": (EntropyAlarm, {"share": 0.9}, [2.0, 1.7]),
    "entropy floor": (EntropyAlarm, {"floor": 1.0}, [0.9]),
    "EOS share": (EOSAlarm, {"share": 0.9}, [1.0, 0.8, 0.8, 0.8]),
    "EOS threshold": (EOSAlarm, {"threshold": 0.5}, [0.4, 0.4, 0.4]),
    "EOS patience": (EOSAlarm, {"patience": 1}, [1.0, 0.1]),
    "critic threshold": (CriticAlarm, {"threshold": 0.5}, [0.4] * 5),
    "critic patience": (CriticAlarm, {"patience": 1}, [0.0]),
    "spread threshold": (SpreadAlarm, {"threshold": 0.9}, [0.8] * 3),
    "spread patience": (SpreadAlarm, {"patience": 1}, [0.0]),
    "ratio threshold": (RatioAlarm, {"threshold": 1e-5}, [1e-4]),
}


@pytest.mark.parametrize(("kind", "options", "figures"), OPTIONS.values(), ids=OPTIONS)
def test_options(raised, kind, options, figures):
    assert raised(kind(), {kind.metric: figures}) == []
    with pytest.warns(AlarmWarning, match=kind.metric):
        assert raised(kind(**options), {kind.metric: figures}) == [len(figures) - 1]


def test_limits_can_be_switched_off(raised):
    assert raised(KLAlarm(jump=None), {"rollout/kl": [4.0] * 5 + [40.0]}) == []
    assert raised(EntropyAlarm(share=0.0, floor=0.0), {"rollout/entropy": [2.0, 1e-6]}) == []
    assert raised(EOSAlarm(share=0.0), {"rollout/eos_rate": [1.0] + [0.0] * 4}) == []


def test_a_kl_that_stays_high_is_no_jump_any_more():
    alarm = KLAlarm()
    judged = [alarm.judge(value) is not None for value in [4.0] * 5 + [20.0] * 4]
    # the recent ones are 4 4 4 4 4, then 4 4 4 4 20, then 4 4 4 20 20, then 4 4 20 20 20
    assert judged == [False] * 5 + [True, True, True, False]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (KLAlarm, {"threshold": 0}, "`threshold` must be above 0"),
        (KLAlarm, {"jump": 1.0}, "`jump` must be above 1 or None"),
        (KLAlarm, {"lowest": 0.0}, "`lowest` must be below 0"),
        (LengthAlarm, {"factor": 1.0}, "`factor` must be above 1"),
        (EntropyAlarm, {"share": 1.0}, "`share` must be from 0"),
        (EntropyAlarm, {"floor": -1.0}, "`floor` must be at least 0"),
        (EOSAlarm, {"share": -0.1}, "`share` must be from 0"),
        (EOSAlarm, {"threshold": 1.1}, "`threshold` must be between 0 and 1"),
        (CriticAlarm, {"threshold": 1.1}, "`threshold` must be at most 1"),
        (SpreadAlarm, {"threshold": 0.0}, "`threshold` must be above 0"),
        (RatioAlarm, {"threshold": 0.0}, "`threshold` must be above 0 or None"),
        (OveroptimizationAlarm, {"gold": "rollout/reward"}, "`gold` must be another figure"),
        (OveroptimizationAlarm, {"window": 3}, "`window` must be at least 4"),
        (OveroptimizationAlarm, {"threshold": -1.0}, "`threshold` must be at least 0"),
    ],
)
def test_bad_arguments(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


class TestTrend:
    def test_golden(self):
        # x -1.5 -0.5 0.5 1.5, y - 1 = -1 0 0 1: slope 3 / 5; residuals -0.1 0.3 -0.3 0.1, squares 0.2;
        # standard error sqrt(0.2 / 2 / 5) = sqrt(0.02), so 0.6 / sqrt(0.02) = 3 sqrt(2)
        assert trend([0.0, 1.0, 1.0, 2.0]) == pytest.approx(3 * math.sqrt(2))

    @pytest.mark.parametrize("seed", range(3))
    def test_scipy(self, seed):
        numbers = random.Random(seed)
        values = [numbers.gauss(5, 2) for _ in range(9)]
        line = linregress(range(9), values)
        assert trend(values) == pytest.approx(line.slope / line.stderr)

    def test_limits(self):
        assert trend([0.1] * 7) == 0
        assert trend([1.0, 2.0, 3.0, 4.0]) > 1e6
        assert trend([4.0, 3.0, 2.0, 1.0]) < -1e6

    def test_is_free_of_units(self):
        assert trend([3.0, 1.0, 2.0, 7.0]) == pytest.approx(trend([30.5, 10.5, 20.5, 70.5]))


class TestOveroptimization:
    up = (0.0, 0.3, 0.2, 0.5, 0.6, 0.8, 0.7, 1.0)
    down = (0.9, 1.0, 0.7, 0.8, 0.5, 0.6, 0.3, 0.2)
    flat = (0.5, 0.6, 0.4, 0.5, 0.6, 0.4, 0.6, 0.5)

    @pytest.mark.parametrize(("reward", "gold"), [(up, up), (up, flat), (flat, down), (down, down)])
    def test_healthy(self, raised, reward, gold):
        assert raised(OveroptimizationAlarm(), {"rollout/reward": reward}, {"val/reward": gold}) == []

    def test_reward_up_and_gold_down(self, raised):
        seen = "rollout/reward rose from 0.25 to 0.775 while val/reward fell from 0.85 to 0.4"
        with pytest.warns(AlarmWarning, match=seen):
            assert raised(OveroptimizationAlarm(), {"rollout/reward": self.up}, {"val/reward": self.down}) == [7]

    def test_names(self, raised):
        alarm = OveroptimizationAlarm(gold="val/reward/vader", reward="rollout/reward/model")
        figures = {"rollout/reward": self.flat, "rollout/reward/model": self.up}
        with pytest.warns(AlarmWarning, match="val/reward/vader fell"):
            assert raised(alarm, figures, {"val/reward": self.up, "val/reward/vader": self.down}) == [7]
        assert alarm.state_key != OveroptimizationAlarm().state_key

    def test_window_and_threshold(self, raised):
        figures, held_out = {"rollout/reward": self.up[:5]}, {"val/reward": self.down[:5]}
        assert raised(OveroptimizationAlarm(window=5, threshold=4.0), figures, held_out) == []
        with pytest.warns(AlarmWarning, match="over 5 evaluations"):
            assert raised(OveroptimizationAlarm(window=5, threshold=2.0), figures, held_out) == [4]

    def test_only_iterations_with_an_evaluation_count(self, raised):
        """An old figure is not read again as a new one, and the sanity check is no evaluation."""
        reward = [value for value in (0.0, 0.3, 0.5, 0.9) for _ in range(2)]
        gold = [value for value in (1.0, 0.8, 0.7, 0.4) for _ in range(2)]
        alarm = OveroptimizationAlarm(window=4)
        with pytest.warns(AlarmWarning):
            found = raised(alarm, {"rollout/reward": reward}, {"val/reward": gold}, check_val_every_n_epoch=2)
        assert found == [7]
        assert [pair[1] for pair in alarm.memory["pairs"]] == pytest.approx([1.0, 0.8, 0.7, 0.4])

    def test_a_gold_score_that_is_not_there_is_told_once(self, raised):
        alarm = OveroptimizationAlarm(gold="val/reward/vadre")
        with pytest.warns(UserWarning, match="val/reward/vadre is none of val/reward/vader") as told:
            raised(alarm, {"rollout/reward": self.up}, {"val/reward/vader": self.up})
        assert sum("nothing to watch" in str(warning.message) for warning in told) == 1

    def test_runs_without_rollouts_or_validation_are_left_alone(self, raised):
        assert raised(OveroptimizationAlarm(), {"train/loss": self.up}, {"val/loss": self.down}) == []
        assert raised(OveroptimizationAlarm(), {"rollout/reward": self.up}, limit_val_batches=0) == []


class TestRatioLimit:
    @pytest.mark.parametrize(
        ("hparams", "precision"),
        [({"dtype": "bfloat16"}, "32-true"), ({}, "bf16-mixed"), ({}, "16-mixed"), ({"load_in_4bit": True}, "32-true")],
    )
    def test_few_digits_get_a_wider_limit(self, hparams, precision):
        trainer = types.SimpleNamespace(precision=precision)
        assert is_exact(types.SimpleNamespace(precision="32-true"), Scripted({}))
        assert not is_exact(trainer, Scripted({}, **hparams))

    def test_so_does_tf32(self, monkeypatch):
        trainer = types.SimpleNamespace(precision="32-true")
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        assert not is_exact(trainer, Scripted({}))

    def test_in_a_run(self, fit, tmp_path):
        figures = {"policy/first_ratio_error": [0.1, 0.49]}
        fit([RatioAlarm()], module=Scripted(figures, dtype="bfloat16"))
        assert not (tmp_path / FILENAME).exists()
        with pytest.warns(AlarmWarning, match=r"is 0\.1, above 0\.001"):
            fit([RatioAlarm()], module=Scripted(figures, dtype="float32"))
        with pytest.warns(AlarmWarning, match=r"is 0\.49, above 0\.3"):
            fit([RatioAlarm(threshold=0.3)], module=Scripted(figures, dtype="bfloat16"))
