"""What all alarms share: when they are raised, who hears of it, and what happens then."""

import json
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from lightning_rlhf.callbacks.alarm import FILENAME, Alarm, AlarmWarning, MetricAlarm, first_sentence


class TooHigh(MetricAlarm):
    """A figure above 10."""

    metric = "rollout/kl"
    meaning = "It should be lower."
    remedy = "Lower it."

    def judge(self, value):
        self.memory.setdefault("seen", []).append(value)
        return f"{self.metric} is {value:g}." if value > 10 else None


class Scripted(L.LightningModule):
    """Logs a given figure in each epoch."""

    def __init__(self, values, name="rollout/kl"):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        self.values, self.name, self.epochs = values, name, []

    def on_train_epoch_start(self):
        self.epochs.append(self.current_epoch)
        if self.values[self.current_epoch] is not None:
            self.log(self.name, self.values[self.current_epoch])

    def training_step(self, batch, batch_idx):
        return self.linear(batch[0]).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def follow(fit):
    """Trains a Scripted module with an alarm; returns module and trainer."""

    def run(alarms, values, **options):
        return fit(alarms, max_epochs=len(values), module=Scripted(values), **options)

    return run


def told_by_alarms(told):
    return [str(warning.message) for warning in told if warning.category is AlarmWarning]


def lines_of(folder):
    return [json.loads(line) for line in (folder / FILENAME).read_text().splitlines()]


def test_a_healthy_run_is_left_alone(follow, tmp_path):
    _, trainer = follow([TooHigh(action="stop")], [1.0, 10.0, 3.0])
    assert trainer.current_epoch == 3
    assert not (tmp_path / FILENAME).exists()


def test_a_raised_alarm_says_what_was_seen_what_it_means_and_what_to_do(follow, tmp_path):
    with pytest.warns(AlarmWarning) as told:
        follow([TooHigh()], [1.0, 20.0])
    place = "iteration 1, step 4"  # two batches an epoch
    message = f"TooHigh at {place}: rollout/kl is 20. It should be lower. Lower it."
    assert told_by_alarms(told) == [message]
    (line,) = lines_of(tmp_path)
    assert line.pop("time").endswith("+00:00")
    assert line == {"iteration": 1, "step": 4, "alarm": "TooHigh", "message": message, "action": "warn"}


def test_it_is_raised_once_per_crossing(follow, tmp_path):
    with pytest.warns(AlarmWarning) as told:
        follow([TooHigh()], [20.0, 30.0, 40.0, 1.0, 20.0, 20.0])
    assert len(told_by_alarms(told)) == 2
    assert [line["iteration"] for line in lines_of(tmp_path)] == [0, 4]


def test_patience_counts_bad_evaluations_in_a_row(follow, tmp_path):
    with pytest.warns(AlarmWarning):
        follow([TooHigh(patience=3)], [20.0, 20.0, 1.0, 20.0, 20.0, 20.0, 20.0])
    assert [line["iteration"] for line in lines_of(tmp_path)] == [5]


def test_stop_ends_the_run_and_says_so(follow, tmp_path):
    with pytest.warns(AlarmWarning, match="The run stops here"):
        module, trainer = follow([TooHigh(action="stop")], [1.0, 20.0, 1.0, 1.0])
    assert module.epochs == [0, 1]
    assert trainer.state.finished
    assert lines_of(tmp_path)[0]["action"] == "stop"


def test_off_does_nothing(follow, tmp_path):
    alarm = TooHigh(action="off")
    module, _ = follow([alarm], [20.0, 20.0])
    assert module.epochs == [0, 1]
    assert not (tmp_path / FILENAME).exists()
    assert alarm.state_dict() == {}
    assert alarm.memory == {}


def test_nan_is_bad_and_a_figure_that_is_not_logged_is_not(follow):
    follow([TooHigh(action="stop")], [None, None])
    with pytest.warns(AlarmWarning, match="rollout/kl is NaN"):
        follow([TooHigh()], [float("nan")])


def test_one_bad_rank_is_enough(follow, monkeypatch):
    """All ranks take rank 1's verdict, and rank zero tells what rank 1 saw."""
    from lightning.pytorch.strategies import SingleDeviceStrategy

    from lightning_rlhf.callbacks import alarm

    asked = []
    monkeypatch.setattr(
        SingleDeviceStrategy, "reduce_boolean_decision", lambda self, own, all: asked.append(all) or True
    )
    monkeypatch.setattr(alarm, "of_all_ranks", lambda own: [own, "that is how it is on the other."])
    with pytest.warns(AlarmWarning, match="on rank 1, that is how it is on the other"):
        module, _ = follow([TooHigh(action="stop")], [1.0, 1.0])
    assert module.epochs == [0]
    assert asked == [False]


def test_first_sentence_names_the_rank():
    assert first_sentence(["a", "b"]) == "a"
    assert first_sentence([None, None, "c"]) == "on rank 2, c"


class TestResume:
    def keep(self, folder):
        return ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)

    def test_memory_patience_and_silence_go_along(self, follow, tmp_path):
        values = [20.0, 20.0, 20.0]
        with pytest.warns(AlarmWarning):
            follow([TooHigh(patience=2), self.keep(tmp_path)], values, enable_checkpointing=True)
        again = TooHigh(patience=2)
        with pytest.warns(AlarmWarning):  # one bad evaluation before the checkpoint, one after it
            fitted = follow([again], values[:2], ckpt_path=tmp_path / "epoch=0.ckpt")
        assert fitted[0].epochs == [1]
        assert again.memory["seen"] == [20.0, 20.0]
        quiet = TooHigh(patience=2)
        follow([quiet], values, ckpt_path=tmp_path / "epoch=1.ckpt")
        assert quiet.memory["seen"] == [20.0, 20.0, 20.0]

    def test_a_run_that_was_stopped_stops_again(self, follow, tmp_path):
        values = [20.0, 20.0, 20.0]
        with pytest.warns(AlarmWarning):
            follow([TooHigh(action="stop"), self.keep(tmp_path)], values, enable_checkpointing=True)
        with pytest.warns(AlarmWarning):
            module, _ = follow([TooHigh(action="stop")], values, ckpt_path=tmp_path / "epoch=0.ckpt")
        assert module.epochs == [1]

    def test_lines_from_after_the_checkpoint_are_replaced(self, follow, tmp_path):
        values = [20.0, 1.0, 20.0]
        with pytest.warns(AlarmWarning):
            follow([TooHigh(), self.keep(tmp_path)], values, enable_checkpointing=True)
        other = {"alarm": "Other", "step": 6}
        with (tmp_path / FILENAME).open("a") as file:
            file.write(json.dumps(other) + '\n12\n{}\n{"cut o')
        with pytest.warns(AlarmWarning):
            follow([TooHigh()], values, ckpt_path=tmp_path / "epoch=1.ckpt")
        assert [(line["alarm"], line.get("iteration")) for line in lines_of(tmp_path)] == [
            ("TooHigh", 0),
            ("Other", None),
            ("TooHigh", 2),
        ]

    def test_a_fresh_run_drops_those_of_the_run_before(self, follow, tmp_path):
        with pytest.warns(AlarmWarning):
            follow([TooHigh()], [20.0])
        follow([TooHigh()], [1.0])
        assert (tmp_path / FILENAME).read_text() == ""

    def test_an_alarm_used_in_a_second_fit_begins_anew(self, follow):
        alarm = TooHigh()
        follow([alarm], [1.0, 2.0])
        follow([alarm], [3.0])
        assert alarm.memory == {"seen": [3.0]}


def test_a_failing_disk_does_not_stop_the_run(follow, tmp_path):
    (tmp_path / FILENAME).mkdir()  # neither readable nor writable as a file
    with pytest.warns(UserWarning, match=r"alarms\.jsonl|rollout/kl is 20") as told:
        module, _ = follow([TooHigh()], [20.0, 1.0])
    messages = [str(warning.message) for warning in told]
    assert module.epochs == [0, 1]
    assert sum("could not be written" in message for message in messages) == 1
    assert sum("rollout/kl is 20" in message for message in messages) == 1


class Run:
    """What an alarm uses of a W&B run."""

    def __init__(self, offline, error=None):
        self.offline, self.error, self.alerts = offline, error, []

    def alert(self, **given):
        if self.error:
            raise self.error
        self.alerts.append(given)


class Online(WandbLogger):
    """A W&B logger whose run is not real."""

    def __init__(self, run):
        self.run = run

    name = version = save_dir = ""

    @property
    def experiment(self):
        return self.run

    def log_metrics(self, *args, **kwargs):
        pass

    log_hyperparams = log_graph = save = after_save_checkpoint = finalize = log_metrics


class TestWandb:
    def test_an_online_run_gets_an_alert(self, follow):
        run = Run(offline=False)
        with pytest.warns(AlarmWarning) as told:
            follow([TooHigh(action="stop")], [20.0], logger=Online(run))
        (alert,) = run.alerts
        assert alert["title"] == "TooHigh"
        assert alert["level"] == "ERROR"
        assert told_by_alarms(told) == [alert["text"] + " The run stops here (action: stop)."]

    def test_an_offline_run_gets_none(self, follow):
        run = Run(offline=True)
        with pytest.warns(AlarmWarning):
            follow([TooHigh()], [20.0], logger=Online(run))
        assert run.alerts == []

    def test_a_service_that_is_down_does_not_stop_the_run(self, follow, tmp_path):
        run = Run(offline=False, error=ConnectionError("no route"))
        with pytest.warns(UserWarning, match="no route|rollout/kl is 20") as told:
            module, _ = follow([TooHigh()], [20.0, 1.0], logger=Online(run))
        assert module.epochs == [0, 1]
        assert len(lines_of(tmp_path)) == 1
        assert any("could not be sent" in str(warning.message) for warning in told)

    def test_a_real_offline_run_is_told_apart(self, follow, tmp_path, monkeypatch):
        for name, value in {"WANDB_SILENT": "true", "WANDB_MODE": "offline", "WANDB_CONSOLE": "off"}.items():
            monkeypatch.setenv(name, value)
        logger = WandbLogger(offline=True, save_dir=tmp_path, project="test")
        sent = []
        monkeypatch.setattr(type(logger.experiment), "alert", lambda *args, **given: sent.append(given))
        with pytest.warns(AlarmWarning) as told:
            follow([TooHigh()], [20.0], logger=logger)
        logger.experiment.finish()
        assert sent == []
        assert len(told_by_alarms(told)) == 1


def test_warnings_can_be_silenced_by_their_category(follow, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AlarmWarning)
        follow([TooHigh()], [20.0])
    assert len(lines_of(tmp_path)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "shout"}, r"`action` must be one of \['off', 'warn', 'stop'\], but got 'shout'"),
        ({"patience": 0}, "`patience` must be at least 1, but got 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Alarm(**options)
