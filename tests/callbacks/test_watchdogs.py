"""Numbers that are not finite, with their reproducer; data that do not come; steps that hang."""

import json
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from lightning_rlhf.callbacks import watchdogs
from lightning_rlhf.callbacks.alarm import FILENAME, AlarmWarning
from lightning_rlhf.callbacks.reproducer import load_reproducer, plain
from lightning_rlhf.callbacks.rng_state import collect_state, restore_state
from lightning_rlhf.callbacks.watchdogs import (
    NonFiniteAlarm,
    NonFiniteError,
    SlowStepAlarm,
    StalledDataAlarm,
    first_bad_loss,
    gradients_of,
    largest_entries,
)

HEALTHY = [{"x": torch.tensor([1.0, 2.0]), "scale": torch.tensor(1.0)} for _ in range(6)]


def poisoned(place, scale):
    """Batches, one of which has another scale."""
    return [batch | {"scale": torch.tensor(scale)} if i == place else batch for i, batch in enumerate(HEALTHY)]


class Scaled(L.LightningModule):
    """Its loss is the batch's scale times something finite, with dropout: it draws random numbers."""

    def __init__(self, rate=0.1, name="scaled", data=None):
        super().__init__()
        self.save_hyperparameters()
        self.linear = torch.nn.Linear(2, 1)
        self.frozen = torch.nn.Linear(2, 1).requires_grad_(False)
        self.losses, self.weights = [], []

    def training_step(self, batch, batch_idx):
        loss = self.linear(torch.nn.functional.dropout(batch["x"])).sum() * batch["scale"] + 1.0
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.weights.append(self.linear.weight.detach().clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.rate)


class InfiniteGradient(torch.autograd.Function):
    """The identity, with an infinite gradient in step 2."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.scale, None


class Exploding(Scaled):
    """Its loss is finite, its gradient has the batch's scale."""

    def training_step(self, batch, batch_idx):
        return InfiniteGradient.apply(self.linear(batch["x"]).sum(), batch["scale"])


@pytest.fixture
def train(make_trainer, tmp_path):
    """One epoch over batches; returns module and trainer."""

    def run(callbacks, batches, module=None, **options):
        torch.manual_seed(0)
        module = module or Scaled()
        trainer = make_trainer(max_epochs=1, callbacks=callbacks, log_every_n_steps=1, **options)
        trainer.fit(module, DataLoader(batches, batch_size=None))
        return module, trainer

    return run


def lines_of(folder):
    path = folder / FILENAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class TestNonFinite:
    def test_a_healthy_run_is_left_alone(self, train, tmp_path):
        module, _ = train([NonFiniteAlarm(action="stop")], poisoned(2, 1e18))
        assert len(module.weights) == 6
        assert not (tmp_path / "nonfinite").exists()
        assert lines_of(tmp_path) == []

    def test_large_is_not_infinite(self, train):
        """The square of 1e25 is no float32; the gradient is."""
        module, _ = train([NonFiniteAlarm(action="stop")], poisoned(2, 1e25), Exploding(rate=1e-30))
        assert len(module.weights) == 6

    @pytest.mark.parametrize("scale", [math.nan, math.inf])
    def test_stop_comes_before_the_step_and_says_where_the_reproducer_is(self, train, tmp_path, scale):
        module = Scaled()
        with pytest.raises(NonFiniteError, match=r"the loss is (nan|inf|-inf) and 2 gradients are not finite") as error:
            train([NonFiniteAlarm(action="stop")], poisoned(2, scale), module)
        assert str(tmp_path / "nonfinite") in str(error.value)
        assert "linear.weight" in str(error.value)
        assert len(module.weights) == 2  # steps that were done
        torch.testing.assert_close(module.linear.weight, module.weights[-1], rtol=0, atol=0)
        (line,) = lines_of(tmp_path)
        assert (line["alarm"], line["step"], line["action"]) == ("NonFiniteAlarm", 2, "stop")

    def test_warn_goes_on(self, train, tmp_path):
        with pytest.warns(AlarmWarning, match="the loss is nan"):
            module, _ = train([NonFiniteAlarm()], poisoned(2, math.nan))
        assert len(module.weights) == 6
        assert module.linear.weight.isnan().all()
        assert len(lines_of(tmp_path)) == 1  # though all later steps are NaN, too

    def test_off_does_nothing(self, train, tmp_path):
        train([NonFiniteAlarm(action="off")], poisoned(2, math.nan))
        assert lines_of(tmp_path) == []
        assert not (tmp_path / "nonfinite").exists()

    def test_a_gradient_alone(self, train, tmp_path):
        with pytest.raises(NonFiniteError, match=r"step 2: 2 gradients are not finite, first that of linear\.weight"):
            train([NonFiniteAlarm(action="stop")], poisoned(2, math.inf), Exploding())
        found = load_reproducer(tmp_path / "nonfinite")
        assert found.gradients == ["linear.weight", "linear.bias"]
        assert all(math.isfinite(loss) for loss in found.losses)

    def test_under_a_loss_scaler_only_the_loss_counts(self, train):
        """Infinite gradients are how the scaler finds its scale: it leaves such a step out."""

        def scaled():
            return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}

        module, _ = train([NonFiniteAlarm(action="stop")], poisoned(2, math.inf), Exploding(), **scaled())
        torch.testing.assert_close(module.weights[2], module.weights[1], rtol=0, atol=0)
        assert not torch.equal(module.weights[3], module.weights[2])
        with pytest.raises(NonFiniteError, match="the loss is nan"):
            train([NonFiniteAlarm(action="stop")], poisoned(2, math.nan), **scaled())

    def test_it_is_raised_again_when_it_comes_back(self, train, tmp_path):
        batches = [
            batch | {"scale": torch.tensor(math.inf if i in (1, 2, 4) else 1.0)} for i, batch in enumerate(HEALTHY)
        ]

        class Clipped(Exploding):
            def on_before_optimizer_step(self, optimizer):
                torch.nn.utils.clip_grad_value_(self.parameters(), 1.0)

        with pytest.warns(AlarmWarning):
            train([NonFiniteAlarm()], batches, Clipped())
        assert [line["step"] for line in lines_of(tmp_path)] == [1, 4]
        assert load_reproducer(tmp_path / "nonfinite").step == 1  # one reproducer: disks are finite

    def test_a_full_disk_does_not_hide_the_alarm(self, train, tmp_path):
        (tmp_path / "nonfinite").write_text("in the way")
        with pytest.raises(NonFiniteError, match="reproducer could not be written"):
            train([NonFiniteAlarm(action="stop")], poisoned(0, math.nan))

    def test_errors_of_torchs_writer_are_disk_errors(self, train, monkeypatch):
        def full(*args):
            raise RuntimeError("PytorchStreamWriter failed writing file data/3")

        monkeypatch.setattr(watchdogs.torch, "save", full)
        with pytest.warns(AlarmWarning, match="could not be written"):
            module, _ = train([NonFiniteAlarm()], poisoned(5, math.nan))
        assert len(module.weights) == 6

    def test_waits_for_the_device_once_a_step(self, train, monkeypatch):
        asked = []
        monkeypatch.setattr(watchdogs, "any_rank", lambda trainer, flag: asked.append(flag.shape) or bool(flag))
        train([NonFiniteAlarm()], HEALTHY, accumulate_grad_batches=3)
        assert asked == [torch.Size([])] * 2


class TestReproducer:
    @pytest.fixture
    def found(self, train, tmp_path):
        """What a run with accumulation leaves: steps of three micro-batches, NaN in the last but one of all."""
        keeper = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, filename="{step}")
        module = Scaled(rate=0.2, data=[HEALTHY])
        options = dict(accumulate_grad_batches=3, enable_checkpointing=True)
        with pytest.raises(NonFiniteError):
            train([NonFiniteAlarm(action="stop"), keeper], poisoned(4, math.nan), module, **options)
        return module, load_reproducer(tmp_path / "nonfinite")

    def test_replaying_the_batch_gives_the_nan_again(self, found):
        module, reproducer = found
        again = Scaled(reproducer.hparams["rate"])
        again.load_state_dict(reproducer.weights, strict=False)
        losses = []
        for batch, state in zip(reproducer.batches, reproducer.rng, strict=True):
            restore_state(state)
            losses.append(again.training_step(batch, 0).item())
        assert losses == pytest.approx(module.losses[3:], nan_ok=True)  # the same dropout, too
        assert [math.isnan(loss) for loss in losses] == [False, True, False]

    def test_what_it_holds(self, found):
        _, reproducer = found
        assert reproducer.module_class.endswith("test_watchdogs.Scaled")
        assert reproducer.hparams["rate"] == 0.2
        assert [math.isnan(loss) for loss in reproducer.losses] == [False, True, False]
        assert [batch["scale"].item() for batch in reproducer.batches] == pytest.approx([1, math.nan, 1], nan_ok=True)
        assert reproducer.gradients == ["linear.weight", "linear.bias"]
        assert (reproducer.rank, reproducer.iteration, reproducer.step) == (0, 0, 1)
        assert reproducer.precision == "32-true"
        assert reproducer.checkpoint.endswith("step=1.ckpt")

    def test_weights_are_those_before_the_step_and_only_what_is_trained(self, found):
        module, reproducer = found
        assert set(reproducer.weights) == {"linear.weight", "linear.bias"}
        torch.testing.assert_close(reproducer.weights["linear.weight"], module.weights[2], rtol=0, atol=0)

    def test_is_read_without_unpickling(self, found, tmp_path):
        for path in (tmp_path / "nonfinite").iterdir():
            assert torch.load(path, weights_only=True)

    def test_weights_that_are_missing(self, found, tmp_path):
        (tmp_path / "nonfinite" / "weights.pt").unlink()
        assert load_reproducer(str(tmp_path / "nonfinite")).weights == {}

    def test_another_rank_or_folder(self, found, tmp_path):
        with pytest.raises(ValueError, match=r"`folder` must hold rank_1\.pt, but .* has \['rank_0\.pt'\]"):
            load_reproducer(tmp_path / "nonfinite", rank=1)
        with pytest.raises(ValueError, match="has no reproducer"):
            load_reproducer(tmp_path / "elsewhere")

    def test_random_states_are_those_before_the_first_draw(self, train, tmp_path):
        states = []

        class Look(Scaled):
            def training_step(self, batch, batch_idx):
                states.append(collect_state()["torch"])
                return super().training_step(batch, batch_idx)

        with pytest.raises(NonFiniteError):
            train([NonFiniteAlarm(action="stop")], poisoned(3, math.nan), Look())
        found = load_reproducer(tmp_path / "nonfinite")
        assert len(found.rng) == 1
        assert torch.equal(found.rng[0]["torch"], states[3])
        assert not torch.equal(states[3], states[2])


def test_plain():
    from collections import UserDict, namedtuple

    pair = namedtuple("Pair", ["a", "b"])(torch.ones(2, requires_grad=True) * 2, ("x", None))
    made = plain(UserDict(pair=pair, n=[1, 2.0, True], other={3: print}))
    tensor = made["pair"].pop("a")
    assert made == {"pair": {"b": ["x", None]}, "n": [1, 2.0, True], "other": {3: repr(print)}}
    assert tensor.tolist() == [2, 2]
    assert not tensor.requires_grad


def test_the_first_bad_loss_and_its_rank():
    assert first_bad_loss([[1.0, 2.0], []]) == (0, None)
    assert first_bad_loss([[1.0], [0.0, -math.inf], [math.inf]]) == (1, -math.inf)


def test_the_rank_with_the_bad_loss_is_named(train, monkeypatch, tmp_path):
    """Where gradients are averaged, a NaN is in those of all ranks."""
    monkeypatch.setattr(watchdogs, "of_all_ranks", lambda own: [own, [1.0], [math.nan]])
    monkeypatch.setattr(L.Trainer, "world_size", 3)
    monkeypatch.setattr(watchdogs, "any_rank", lambda trainer, flag: bool(flag))
    with pytest.raises(NonFiniteError, match=r"the loss is nan on rank 2 and 2 gradients .*rank=2\)"):
        train([NonFiniteAlarm(action="stop")], poisoned(2, math.inf), Exploding())


def test_largest_entries_finds_what_is_not_finite():
    tensors = [torch.tensor([1.0, -3.0]), torch.tensor([1.0, math.nan]), torch.tensor([-math.inf]), torch.ones(0)]
    assert [norm.item() for norm in largest_entries(tensors)] == pytest.approx([3.0, math.nan, math.inf], nan_ok=True)
    assert largest_entries([torch.ones(0)]) == []
    assert largest_entries([torch.tensor([60000.0], dtype=torch.float16)])[0] == 60000


def test_gradients_of_names_what_has_one():
    module = torch.nn.Linear(2, 1)
    assert gradients_of(module) == []
    module.bias.grad = torch.ones(1)
    assert gradients_of(module) == [("bias", module.bias.grad)]


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Loop:
    """What a training loop lets the alarms see, in the time that it is said to take."""

    def __init__(self, alarm, trainer):
        self.alarm, self.trainer, self.clock = alarm, trainer, Clock()
        alarm.clock = self.clock
        alarm.setup(trainer, None, "fit")

    def epoch(self, steps, rollout=0.0):
        """Batches: seconds of waiting and of work each. The rollout comes after the callbacks' hook."""
        self.alarm.on_train_epoch_start(self.trainer, None)
        self.clock.now += rollout
        for wait, work in steps:
            self.clock.now += wait
            self.alarm.on_train_batch_start(self.trainer, None, None, 0)
            self.clock.now += work
            self.alarm.on_train_batch_end(self.trainer, None, None, None, 0)


@pytest.fixture
def loop(make_trainer):
    return lambda alarm: Loop(alarm, make_trainer())


class TestStalledData:
    def test_waiting_for_half_of_the_time_is_bad(self, loop):
        loop(StalledDataAlarm(window=4)).epoch([(0.0, 3.0)] + [(3.0, 3.0)] * 3)  # 9 of 21 seconds
        with pytest.warns(AlarmWarning, match=r"15 of 27 seconds of 4 batches .* more than 50%"):
            loop(StalledDataAlarm(window=4)).epoch([(0.0, 3.0)] + [(5.0, 3.0)] * 3)

    def test_share_and_min_seconds(self, loop):
        steps = [(0.0, 3.0)] + [(3.0, 3.0)] * 3
        with pytest.warns(AlarmWarning, match="more than 40%"):
            loop(StalledDataAlarm(window=4, share=0.4)).epoch(steps)
        loop(StalledDataAlarm(window=4, share=0.4, min_seconds=9.0)).epoch(steps)

    def test_one_long_wait_is_seen(self, loop):
        with pytest.warns(AlarmWarning, match="100 of 120 seconds"):
            loop(StalledDataAlarm()).epoch([(0.0, 1.0)] * 19 + [(100.0, 1.0)])

    def test_a_rollout_is_no_waiting(self, loop):
        run = loop(StalledDataAlarm(window=2))
        for _ in range(4):
            run.epoch([(0.1, 1.0), (0.0, 1.0)], rollout=100.0)

    def test_nor_are_validation_and_checkpoints(self, loop):
        run = loop(StalledDataAlarm(window=2))
        run.epoch([(0.0, 1.0)])
        run.clock.now += 100
        run.alarm.on_validation_end(run.trainer, None)
        run.alarm.on_train_batch_start(run.trainer, None, None, 0)
        run.alarm.on_train_batch_end(run.trainer, None, None, None, 0)
        run.epoch([(0.0, 1.0)])
        run.alarm.on_save_checkpoint(run.trainer, None, {})
        run.clock.now += 100
        run.alarm.on_train_batch_start(run.trainer, None, None, 0)
        run.alarm.on_train_batch_end(run.trainer, None, None, None, 0)

    def test_windows_go_on_over_epochs(self, loop):
        run = loop(StalledDataAlarm(window=4))
        run.epoch([(0.0, 1.0), (10.0, 1.0)])
        with pytest.warns(AlarmWarning):
            run.epoch([(0.0, 1.0), (10.0, 1.0)])

    def test_off(self, loop):
        loop(StalledDataAlarm(window=2, action="off")).epoch([(0.0, 1.0), (100.0, 1.0)])

    def test_stop_in_a_run(self, train, tmp_path):
        """The clock moves while the loader works, as it would for a slow disk."""
        clock, alarm = Clock(), StalledDataAlarm(window=2, action="stop")
        alarm.clock = clock

        class Slow(torch.utils.data.Dataset):
            def __len__(self):
                return len(HEALTHY)

            def __getitem__(self, i):
                clock.now += 10.0
                return HEALTHY[i]

        with pytest.warns(AlarmWarning, match="StalledDataAlarm at iteration 0, step 2"):
            module, _ = train([alarm], Slow())
        assert len(module.weights) == 2


class TestSlowStep:
    def test_a_step_many_times_as_slow_as_others(self, loop):
        run = loop(SlowStepAlarm(window=3))
        run.epoch([(0.0, 1.0)] * 3 + [(0.0, 1.0), (0.0, 5.0), (0.0, 1.0)])
        with pytest.warns(AlarmWarning, match=r"one of 3 batches took 5\.1 s, above 5 times the usual 1 s"):
            run.epoch([(0.0, 1.0), (0.0, 1.0), (0.0, 5.1)])

    def test_options(self, loop):
        steps = [(0.0, 1.0)] * 3 + [(0.0, 4.0)] + [(0.0, 1.0)] * 2
        with pytest.warns(AlarmWarning):
            loop(SlowStepAlarm(window=3, factor=3.0)).epoch(steps)
        loop(SlowStepAlarm(window=3, factor=3.0, min_seconds=4.0)).epoch(steps)
        loop(SlowStepAlarm(window=6, factor=3.0)).epoch(steps)  # still in the first window

    def test_the_first_window_and_waiting_do_not_count(self, loop):
        loop(SlowStepAlarm(window=2)).epoch([(0.0, 60.0), (0.0, 1.0), (90.0, 1.0), (90.0, 1.0)], rollout=500.0)

    def test_a_run_that_becomes_slow_is_told_of_once(self, loop):
        run = loop(SlowStepAlarm(window=2))
        run.epoch([(0.0, 1.0)] * 4)
        with pytest.warns(AlarmWarning) as told:
            run.epoch([(0.0, 9.0)] * 20)
        assert len(told) == 1

    def test_a_second_fit_begins_anew(self, loop):
        alarm = SlowStepAlarm(window=2)
        loop(alarm).epoch([(0.0, 1.0)] * 4)
        loop(alarm).epoch([(0.0, 9.0)] * 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StalledDataAlarm(share=1.0), "`share` must be above 0 and below 1"),
        (lambda: StalledDataAlarm(window=0), "`window` must be at least 1"),
        (lambda: StalledDataAlarm(min_seconds=-1.0), "`min_seconds` must be at least 0"),
        (lambda: SlowStepAlarm(factor=1.0), "`factor` must be above 1"),
        (lambda: NonFiniteAlarm(action="never"), "`action` must be one of"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
