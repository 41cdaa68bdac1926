"""What a user sees of a run: where it is, how it goes, how long it still takes."""

import re
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from lightning_rlhf.callbacks import ProgressBar, progress
from lightning_rlhf.callbacks.progress import Pace, epochs_of_run, short_figures


def test_one_plain_line_per_epoch_where_output_is_no_terminal(fit, capsys):
    fit([ProgressBar()], enable_progress_bar=True)
    assert capsys.readouterr().out.splitlines() == [
        "epoch 0: reward 0.5, kl 0, clip 0.25, val reward 3.5",
        "epoch 1: reward 1.5, kl 2, clip 0.25, val reward 5.5",
    ]


def test_figures_by_method():
    assert short_figures({"train/loss": 2.0, "val/perplexity": 123.4}) == {"loss": "2", "val ppl": "123"}
    assert short_figures({"train/loss": 0.65, "val/agreement": 0.7}) == {"loss": "0.65", "agreement": "0.7"}
    ppo = {"rollout/reward": 0.5, "train/loss": 2.0, "throughput/tokens_per_second": 1234.5}
    assert short_figures(ppo) == {"reward": "0.5", "tok/s": "1234"}


# --- the bar ---------------------------------------------------------------------------------------------------------


class Screen(L.Callback):
    """What the bar shows at 80 columns, at moments of a run; behind the bar in the list of callbacks."""

    def __init__(self, bar, width=80):
        self.bar, self.width, self.shown = bar, width, {}

    def look(self, moment):
        console = Console(width=self.width, force_terminal=False)
        with console.capture() as capture:
            console.print(self.bar._draw())
        self.shown.setdefault(moment, []).append(capture.get().splitlines())

    def on_train_epoch_start(self, trainer, pl_module):
        self.look("start")

    def on_train_batch_end(self, trainer, *args):
        self.look("batch")

    def on_validation_batch_end(self, trainer, *args):
        self.look("checking" if trainer.sanity_checking else "validation")

    def on_test_batch_end(self, *args):
        self.look("test")

    def on_train_end(self, *args):
        self.look("end")


class Model(L.LightningModule):
    """Logs a loss."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.log("train/loss", 0.25)
        return self.w * batch

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", 0.5, batch_size=1)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD([self.w], lr=0.1)


class OnPolicy(Model):
    """Has a phase."""

    def __init__(self):
        super().__init__()
        self.clock = SimpleNamespace(phase="")

    def on_train_epoch_start(self):
        self.log("rollout/reward", 1.5)
        self.clock.phase = "update"


@pytest.fixture
def in_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "is_terminal", lambda: True)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_READINGS", 0)
    return capsys


def loader(batches):
    return DataLoader(torch.ones(batches), batch_size=None)


def watch(make_trainer, module, batches=4, held_out=2, ckpt_path=None, callbacks=(), **options):
    bar = ProgressBar()
    screen = Screen(bar)
    options = {"max_epochs": 2, "enable_progress_bar": True} | options
    trainer = make_trainer(callbacks=[bar, screen, *callbacks], **options)
    trainer.fit(module, loader(batches), loader(held_out), ckpt_path=ckpt_path, weights_only=True)
    return screen, trainer


def words(lines):
    """The first line without its bar and with # for seconds, and the figures."""
    first = " ".join(word for word in lines[0].split() if not set(word) & set("━╸╺"))
    return [re.sub(r"\d+ s\b", "# s", first), *lines[1:]]


def test_a_fine_tuning_run(make_trainer, in_terminal):
    screen, trainer = watch(make_trainer, Model(), num_sanity_val_steps=1)
    shown = {moment: [words(lines) for lines in all_lines] for moment, all_lines in screen.shown.items()}
    assert shown["checking"][0][0] == "epoch 1/2 1/1 checking"
    assert shown["start"][0][0] == "epoch 1/2 0/4 training"
    assert shown["batch"][2] == ["epoch 1/2 3/4 training # s left", "loss 0.25"]
    assert [lines[0] for lines in shown["validation"]] == [
        f"epoch {e}/2 {n}/2 validating # s left" for e in (1, 2) for n in (1, 2)
    ]
    assert shown["start"][1] == ["epoch 2/2 0/4 training # s left", "loss 0.25  val accuracy 0.5"]
    assert shown["end"][0] == ["epoch 2/2 4/4 done in # s", "loss 0.25  val accuracy 0.5"]
    trainer.test(Model(), loader(3))
    assert [words(lines)[0] for lines in screen.shown["test"]][-1].startswith("test 3/3")


def test_an_on_policy_run_counts_iterations_and_shows_its_phase(make_trainer, in_terminal):
    module = OnPolicy()
    screen, _ = watch(make_trainer, module)
    assert words(screen.shown["batch"][0])[0] == "iteration 1/2 1/4 updating"  # how long one takes is not known yet
    assert words(screen.shown["batch"][4]) == ["iteration 2/2 1/4 updating # s left", "reward 1.5  val accuracy 0.5"]
    for phase, name in {"rollout": "rolling out", "scoring": "scoring", "update": "updating"}.items():
        module.clock.phase = phase
        screen.bar._took, screen.bar.trainer.training = None, True
        screen.look(phase)
        assert name in screen.shown[phase][0][0]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal(make_trainer, in_terminal, width):
    bar = ProgressBar()
    screen = Screen(bar, width)
    trainer = make_trainer(callbacks=[bar, screen], max_epochs=1, enable_progress_bar=True)
    trainer.fit(OnPolicy(), loader(4), loader(2))
    for lines in (lines for shown in screen.shown.values() for lines in shown):
        assert len(lines) <= 2
        assert all(len(line) <= width for line in lines)


def test_a_terminal_shows_the_bar(fit, in_terminal):
    fit([ProgressBar()], max_epochs=1, enable_progress_bar=True)
    printed = in_terminal.readouterr().out
    assert "epoch 1/1" in printed
    assert "reward 0.5  kl 0  clip 0.25" in printed


def test_without_refreshes_there_is_no_bar_and_no_line(fit, capsys):
    fit([ProgressBar(refresh_rate=0)], enable_progress_bar=True)
    assert capsys.readouterr().out == ""


class SaveAt(L.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_resumed_run_counts_from_where_it_was(make_trainer, in_terminal, tmp_path):
    path = tmp_path / "at.ckpt"
    watch(
        make_trainer,
        Model(),
        callbacks=[SaveAt(4, path)],
        max_epochs=1,
        check_val_every_n_epoch=None,
        val_check_interval=100,
    )
    screen, _ = watch(make_trainer, Model(), ckpt_path=path, max_epochs=3)
    assert [words(lines)[0].split(" training")[0] for lines in screen.shown["batch"]] == [
        f"epoch {epoch}/3 {n}/4" for epoch in (2, 3) for n in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize("broken", ["get_metrics", "total_train_batches", "_where"])
def test_an_error_in_the_bar_ends_no_run(make_trainer, in_terminal, monkeypatch, broken):
    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(ProgressBar, broken, property(fail) if broken == "total_train_batches" else fail)
    bar = ProgressBar()
    trainer = make_trainer(callbacks=[bar], max_epochs=2, enable_progress_bar=True)
    if broken == "_where":
        trainer.fit(Model(), loader(4), loader(1))
        assert "no progress bar: RuntimeError('broken')" in in_terminal.readouterr().out
    else:
        with pytest.warns(UserWarning, match="The progress bar is off, as it failed: RuntimeError"):
            trainer.fit(Model(), loader(4), loader(1))
    assert trainer.global_step == 8


# --- the time left ---------------------------------------------------------------------------------------------------


def paced(durations, within=0.0):
    """A Pace after epochs that took so long, so far within the next."""
    now = [100.0]
    pace = Pace(lambda: now[0])
    for seconds in durations:
        pace.start_epoch()
        now[0] += seconds
        pace.end_epoch()
        now[0] += 1000  # between epochs nothing counts
    pace.start_epoch()
    now[0] += within
    return pace


def test_the_time_left_is_that_of_the_epochs_to_come_at_their_median():
    assert paced([10.0, 90.0, 20.0], within=5.0).seconds_left(3) == 3 * 20 - 5
    assert paced([10.0], within=25.0).seconds_left(1) == 0  # it takes longer than the others: not below 0
    assert paced([10.0], within=4.0).seconds_left(2.5) == 2.5 * 10 - 4


def test_in_a_first_epoch_the_time_left_is_that_of_its_batches():
    assert paced([], within=6.0).seconds_left(2, share=0.25) == 24 * 2 - 6
    assert paced([], within=6.0).seconds_left(2) is None


def test_of_a_run_without_end_nothing_is_known():
    assert paced([10.0]).seconds_left(float("inf")) is None


def test_an_epoch_whose_start_was_not_seen_is_not_timed():
    pace = Pace(lambda: 5.0)
    pace.end_epoch()
    assert pace.seconds_left(3) is None


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"max_epochs": 3}, 3),
        ({"max_epochs": 3, "max_steps": 6}, 1.5),
        ({"max_epochs": -1, "max_steps": 6}, 1.5),
        ({"max_epochs": -1, "max_steps": 6, "accumulate_grad_batches": 2}, 3),
        ({"max_epochs": 2, "max_steps": 100}, 2),
    ],
)
def test_a_run_ends_with_its_epochs_or_its_steps(make_trainer, options, epochs):
    trainer = make_trainer(**options)
    trainer.fit(Model(), loader(4), loader(1))
    assert epochs_of_run(trainer) == epochs
