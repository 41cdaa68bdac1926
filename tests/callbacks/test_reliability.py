"""The reliability diagram: rows of the table, files, what W&B gets, and what is left alone."""

import csv
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader

from lightning_rlhf.callbacks.reliability import Reliability, plot
from lightning_rlhf.modules import RewardModule

NAN = float("nan")
PAIRS = torch.tensor([[2, 0.05, 0.25], [0, NAN, NAN], [3, 0.5, 0.5], [2, 0.95, 0.75]], dtype=torch.float64)
LEVELS = torch.tensor([[4, 0.125, 0.5], [1, 0.75, 1.0]], dtype=torch.float64)


class Evaluated(L.LightningModule):
    """Has the tables of an evaluation."""

    def __init__(self, **tables):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        if tables:
            self.reliability = tables

    def validation_step(self, batch, batch_idx):
        pass

    test_step = training_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class KeptImages(WandbLogger):
    """A W&B logger that sends nothing and keeps the pictures."""

    def __init__(self):
        self.images = []

    def log_image(self, key, images, step=None, **kwargs):
        self.images.append((key, images, step))

    @property
    def save_dir(self):
        return None

    def log_metrics(self, metrics, step=None):
        pass

    log_hyperparams = log_graph = save = finalize = after_save_checkpoint = lambda self, *args, **kwargs: None
    name = version = experiment = None


def loader():
    return DataLoader(torch.zeros(1, 1))


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_holds_the_bins_that_are_not_empty(make_trainer, tmp_path):
    make_trainer(callbacks=[Reliability()]).validate(Evaluated(pairs=PAIRS), loader(), verbose=False)
    assert rows(tmp_path / "reliability.csv") == [
        {"bin": "0", "count": "2", "probability": "0.05", "label": "0.25"},
        {"bin": "2", "count": "3", "probability": "0.5", "label": "0.5"},
        {"bin": "3", "count": "2", "probability": "0.95", "label": "0.75"},
    ]
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reliability.csv", "reliability.png"]


def test_levels_and_tests_have_files_of_their_own(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[Reliability(picture=False)])
    trainer.test(Evaluated(pairs=PAIRS, levels=LEVELS), loader(), verbose=False)
    names = ["test_reliability.csv", "test_reliability_levels.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [row["bin"] for row in rows(tmp_path / names[1])] == ["0", "1"]


def test_the_picture_shows_the_bins_where_they_are():
    diagram, counts = plot([(0, 2, 0.05, 0.25), (3, 2, 0.95, 0.75)], 4, "pairs").axes
    model = next(line for line in diagram.lines if line.get_label() == "the model")
    assert model.get_xydata().tolist() == [[0.05, 0.25], [0.95, 0.75]]
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in counts.patches]
    assert bars == [pytest.approx((0.125, 2)), pytest.approx((0.875, 2))]
    assert plot([], 4, "levels").axes  # nothing was compared


def test_wandb_gets_the_pictures(make_trainer, tmp_path):
    logger = KeptImages()
    trainer = make_trainer(callbacks=[Reliability()], logger=logger)
    trainer.validate(Evaluated(pairs=PAIRS, levels=LEVELS), loader(), verbose=False)
    assert logger.images == [
        ("val/reliability", [str(tmp_path / "reliability.png")], 0),
        ("val/reliability_levels", [str(tmp_path / "reliability_levels.png")], 0),
    ]


def test_other_modules_and_sanity_checks_are_left_alone(make_trainer, tmp_path):
    make_trainer(callbacks=[Reliability()]).validate(Evaluated(), loader(), verbose=False)
    module, watch = Evaluated(pairs=PAIRS), Reliability()
    trainer = {"is_global_zero": True, "default_root_dir": tmp_path, "loggers": []}
    watch.on_validation_end(SimpleNamespace(**trainer, sanity_checking=True), module)
    watch.on_test_end(SimpleNamespace(**trainer | {"is_global_zero": False}), module)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_warning(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    trainer = make_trainer(callbacks=[Reliability()], default_root_dir=tmp_path / "file")
    with pytest.warns(UserWarning, match="reliability cannot be written, training goes on without it"):
        trainer.test(Evaluated(pairs=PAIRS), loader(), verbose=False)


def test_it_is_that_of_a_reward_model(tiny_model, make_trainer, tmp_path):
    texts = torch.tensor([[97, 98, 0], [99, 100, 0], [98, 98, 0], [97, 101, 0]])
    batch = {"input_ids": texts, "attention_mask": torch.ones_like(texts), "margin": torch.zeros(2)}
    module = RewardModule(tiny_model)
    trainer = make_trainer(callbacks=[Reliability()], max_epochs=1)
    trainer.fit(module, DataLoader([batch], batch_size=None), DataLoader([batch], batch_size=None))
    with torch.no_grad():
        chosen, rejected = module.network.raw(texts, torch.ones_like(texts)).chunk(2)
    p = (chosen - rejected).sigmoid().tolist()
    found = rows(tmp_path / "reliability.csv")
    assert sum(int(row["count"]) for row in found) == 4  # both pairs, in both orders
    expected = sorted([(x, 1.0) for x in p] + [(1 - x, 0.0) for x in p])
    total = sum(int(row["count"]) * float(row["probability"]) for row in found)
    assert total == pytest.approx(sum(x for x, _ in expected), rel=1e-5)
    assert [int(row["bin"]) for row in found] == sorted({int(x * 10) for x, _ in expected})
    error = sum(int(row["count"]) * abs(float(row["probability"]) - float(row["label"])) for row in found) / 4
    assert trainer.callback_metrics["val/calibration_error"].item() == pytest.approx(error, rel=1e-5)
