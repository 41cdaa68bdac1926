import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from offline_wandb import OfflineRun
from torch.utils.data import DataLoader, DistributedSampler

from lightning_rlhf.callbacks.validation_samples import ValidationSamples, as_rows, held_out_size, merge_ranks

PROMPTS = ["The film", "An actor", "One | two", "Lines"]


def rows_of(path):
    with (path / "validation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def places(path):
    return [(row["iteration"], row["step"]) for row in rows_of(path)[::4]]


def test_all_rows_of_every_evaluation_in_the_order_of_the_data(fit, tmp_path):
    fit([ValidationSamples(num_samples=1)])
    rows = rows_of(tmp_path)
    assert [row["prompt"] for row in rows] == PROMPTS * 3
    assert [row["response"] for row in rows[::4]] == [f"text 0, level\n{level}" for level in (0, 2, 4)]
    assert places(tmp_path) == [("0", "0"), ("1", "2"), ("2", "4")]
    assert list(rows[0])[:5] == ["iteration", "step", "prompt", "response", "reward"]


def test_sanity_check_of_a_part_is_no_evaluation(fit, tmp_path):
    fit([ValidationSamples()], num_sanity_val_steps=1)
    assert places(tmp_path) == [("1", "2"), ("2", "4")]


def test_evaluations_within_an_iteration_belong_to_those_finished(fit, tmp_path):
    fit([ValidationSamples()], val_check_interval=1)
    assert places(tmp_path) == [("0", "0"), ("0", "1"), ("1", "2"), ("1", "3"), ("2", "4")]


def test_resumed_run_replaces_what_it_repeats(fit, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fit([ValidationSamples(), keep], enable_checkpointing=True)
    fit([ValidationSamples()], max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert places(tmp_path) == [("0", "0"), ("1", "2"), ("2", "4"), ("3", "6")]


def test_columns_of_some_evaluations_are_empty_in_others(fit, tmp_path):
    module, _ = fit([], max_epochs=1)

    class Compared(type(module)):
        def validation_step(self, batch, batch_idx):
            columns = super().validation_step(batch, batch_idx)
            if self.global_step == 2:
                columns["reference_response"] = ["reference"] * len(columns["prompt"])
            return columns

    fit([ValidationSamples()], module=Compared())
    assert [row["reference_response"] for row in rows_of(tmp_path)[::4]] == ["", "reference", ""]


def test_module_that_returns_no_columns_is_left_alone(fit, tmp_path):
    module, _ = fit([], max_epochs=1)

    class Silent(type(module)):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", 1.0)

    fit([ValidationSamples()], module=Silent())
    assert not (tmp_path / "validation.csv").exists()


def test_offline_wandb_run_reads_down_the_training_per_prompt(fit, tmp_path, monkeypatch):
    for name, value in {"WANDB_SILENT": "true", "WANDB_MODE": "offline", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    bare, _ = fit([])
    logger = WandbLogger(offline=True, save_dir=tmp_path, project="test")
    watched, _ = fit([ValidationSamples(num_samples=2)], logger=logger)
    logger.experiment.finish()
    assert watched.trace == bare.trace
    table = OfflineRun(tmp_path).tables("samples/validation")[-1]
    assert table["columns"][:5] == ["prompt_number", "iteration", "step", "prompt", "response"]
    assert [row[:5] for row in table["data"]] == [
        [i, iteration, 2 * iteration, PROMPTS[i], f"text {i}, level\n{2 * iteration}"]
        for i in range(2)
        for iteration in range(3)
    ]


def test_ranks_are_merged_in_the_order_of_the_data():
    rank_0, rank_1 = [{"prompt": "a"}, {"prompt": "c"}], [{"prompt": "b"}, {"prompt": "a"}]
    assert merge_ranks([rank_0, rank_1], 3) == [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    assert merge_ranks([rank_0, rank_0], None) == rank_0  # every rank saw everything
    assert merge_ranks([rank_0, rank_0], 4) == [rank_0[0]] * 2 + [rank_0[1]] * 2  # the data have repeats


@pytest.mark.parametrize(("dealt", "size"), [(True, 5), (False, None)])
def test_held_out_size(dealt, size):
    sampler = DistributedSampler(range(5), num_replicas=2, rank=0) if dealt else None
    assert held_out_size(SimpleNamespace(val_dataloaders=DataLoader(range(5), sampler=sampler))) == size


def test_as_rows():
    assert as_rows({"a": torch.tensor([1.0, 2.0]), "b": [torch.tensor(3), "x"]}) == [
        {"a": 1.0, "b": 3},
        {"a": 2.0, "b": "x"},
    ]


def test_num_samples_must_not_be_negative():
    with pytest.raises(ValueError, match="`num_samples` must be at least 0, but is -1"):
        ValidationSamples(num_samples=-1)
