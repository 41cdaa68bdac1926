import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from run_folders import Page, held_out_rows, rollout_rows, write_csv

from lightning_rlhf.callbacks import report as report_file
from lightning_rlhf.callbacks.report import RunReport


@pytest.fixture
def files(tmp_path):
    """What other callbacks would have left in the run's folder."""
    write_csv(tmp_path / "metrics.csv", rollout_rows())
    write_csv(tmp_path / "validation.csv", held_out_rows(0, [0.0, 2.0, 4.0]) + held_out_rows(3, [1.0, 4.0, 7.0]))
    return tmp_path


@pytest.fixture
def written(monkeypatch):
    """Names of the reports that were asked for; none is drawn."""
    names = []

    def write(folder, filename):
        names.append(filename)
        return Path(folder) / filename

    monkeypatch.setattr(report_file, "write_report", write)
    monkeypatch.setattr(report_file, "outcome", lambda folder: "Good.")
    return names


def test_report_of_a_run(fit, files, capsys):
    (files / "reward.json").write_text(json.dumps({"val/agreement": 0.5, "test/agreement": 0.8}))
    reward_model = str(files / "reward.json")
    fit([RunReport(min_reward_gain=1.0, max_kl=2.5, reward_model_metrics=reward_model)])
    page = Page((files / "report.html").read_text())
    assert "2 of 3 goals met" in page.texts  # the mean reward rises from 2 to 4, by 1 standard deviation; the KL is 3
    assert "0.800" in page.texts  # that of the test, not of validation
    said = capsys.readouterr().out
    assert said == f"1 of 3 goals missed: mean sequence KL (nats). Report: {files / 'report.html'}\n"


def test_figures_of_this_run_are_in_it(fit, tmp_path):
    logger = CSVLogger(tmp_path.parent, name=tmp_path.name, version="", flush_logs_every_n_steps=1000)
    fit([RunReport()], logger=logger)
    page = Page((tmp_path / "report.html").read_text())
    assert page.texts[page.texts.index("Iterations") + 1] == "2"  # though the logger still kept its rows back
    assert page.texts[page.texts.index("Reward of the rollouts") + 1 :][:2] == ["0.500 →", "1.5"]


def test_goals_are_kept_only_when_asked_for(fit, files, written):
    fit([RunReport(gold="reward/gold", min_gold_gain=0.1)])
    assert json.loads((files / "goals.json").read_text()) == {"gold": "reward/gold", "min_gold_gain": 0.1}
    fit([RunReport()])
    assert not (files / "goals.json").exists()
    fit([RunReport(min_agreement=0.9)])  # of no reward model
    assert not (files / "goals.json").exists()


def test_agreement_that_is_not_there(fit, files, written):
    fit([RunReport(reward_model_metrics=str(files / "missing.json"), min_agreement=0.7)])
    goals = json.loads((files / "goals.json").read_text())
    assert goals["min_agreement"] == 0.7
    assert "agreement" not in goals


def test_written_after_validations_and_at_the_end(fit, tmp_path, written):
    fit([RunReport(filename="page.html")], max_epochs=3)
    assert written == ["page.html"] * 4


def test_reports_take_a_twentieth_of_the_time(fit, tmp_path, written, monkeypatch):
    times = iter([0.0, 0.0, 1.0, 20.5, 21.0, 21.0, 22.0, 30.0, 31.0])
    monkeypatch.setattr(report_file, "_clock", lambda: next(times))
    # The first took 1 s and was done at 1: the validation at 20.5 comes too early, that at 21 does not.
    fit([RunReport()], max_epochs=3)
    assert len(written) == 3  # the last is that at the end


def test_written_when_an_exception_ends_the_run(fit, files, written):
    class Fails(RunReport):
        def on_train_epoch_end(self, trainer, pl_module):
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        fit([Fails()], limit_val_batches=0)
    assert written == ["report.html"]
    for path in files.glob("*.csv"):
        path.unlink()
    with pytest.raises(KeyError, match="broken"):
        fit([Fails()], limit_val_batches=0)
    assert written == ["report.html"]  # there is nothing to report


def test_failure_is_a_warning(fit, files, monkeypatch, capsys):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(report_file, "write_report", fail)
    with pytest.warns(UserWarning, match="The report could not be written: OSError: disk full"):
        fit([RunReport()])
    assert "Report:" not in capsys.readouterr().out


def test_goals_that_cannot_be_kept_are_a_warning(fit, files, written):
    (files / "goals.json").mkdir()
    with pytest.warns(UserWarning, match=r"The goals cannot be kept in .*goals.json"):
        fit([RunReport(max_kl=1.0)])


def test_a_run_without_any_file_goes_on(fit, tmp_path):
    with pytest.warns(
        UserWarning, match="The report could not be written: ValueError: `folder` must hold a run's files"
    ):
        fit([RunReport()])


def test_other_ranks_write_nothing(fit, files, written, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.Trainer.is_global_zero", property(lambda trainer: False))
    fit([RunReport(max_kl=1.0)])
    assert written == []
    assert not (files / "goals.json").exists()


def test_training_is_the_same_bit_for_bit(fit, files):
    with_report, _ = fit([RunReport(max_kl=1.0)])
    without, _ = fit([])
    assert with_report.trace == without.trace
    assert torch.equal(with_report.linear.weight, without.linear.weight)


def test_filename_is_a_name():
    with pytest.raises(ValueError, match=r"`filename` must be a plain name in the run's folder, but is 'a/b.html'"):
        RunReport(filename="a/b.html")
