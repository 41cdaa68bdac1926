import csv
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from offline_wandb import OfflineRun

from lightning_rlhf.callbacks.sinks import GrowingTable, log_html, log_image, log_table, markdown, thinned

ROWS = [{"prompt": "a|b", "reward": 0.5, "note": None}, {"prompt": "c\nd", "reward": -2.0}]
COLUMNS = ["prompt", "reward", "note"]


@pytest.fixture
def image(tmp_path):
    from matplotlib.image import imsave

    pixels = np.zeros((3, 4, 3))
    pixels[0, 0] = (1.0, 0.0, 0.0)
    imsave(tmp_path / "image.png", pixels)
    return tmp_path / "image.png"


def log_all(logger, image):
    log_table(logger, "samples/x", COLUMNS, ROWS, 7)
    log_html(logger, "tokens/view", "<p>page</p>", 7)
    log_image(logger, "plots/y", image, 7)


def test_wandb(tmp_path, monkeypatch, image):
    for name, value in {"WANDB_SILENT": "true", "WANDB_MODE": "offline", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    logger = WandbLogger(offline=True, save_dir=tmp_path, project="test")
    log_all(logger, image)
    logger.experiment.finish()
    run = OfflineRun(tmp_path)
    (table,) = run.tables("samples/x")
    assert table["columns"] == COLUMNS
    assert table["data"] == [["a|b", 0.5, None], ["c\nd", -2.0, None]]
    ((step, page),) = run.series("trainer/global_step", "tokens/view")
    assert step == 7
    assert (run.folder / "files" / page["path"]).read_text() == "<p>page</p>"
    ((_, images),) = run.series("trainer/global_step", "plots/y")
    assert (images["width"], images["height"], images["count"]) == (4, 3, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path, image):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    log_all(logger, image)
    logger.finalize("success")
    events = accumulator.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    (text,) = events.Tensors("samples/x/text_summary")
    assert text.step == 7
    assert text.tensor_proto.string_val[0].decode().splitlines()[2] == "| a\\|b | 0.5 |  |"
    (shown,) = events.Images("plots/y")
    assert (shown.step, shown.width, shown.height) == (7, 4, 3)


def test_mlflow(tmp_path, monkeypatch, image):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/ml", experiment_name="x")
    log_table(logger, "samples/x", COLUMNS, ROWS[:1], 3)
    log_all(logger, image)
    (folder,) = (tmp_path / "ml").glob("*/*/artifacts")
    with (folder / "samples/x.csv").open(newline="") as file:  # the first table is replaced
        assert list(csv.reader(file)) == [COLUMNS, ["a|b", "0.5", ""], ["c\nd", "-2.0", ""]]
    assert (folder / "tokens/view_7.html").read_text() == "<p>page</p>"
    assert (folder / "plots/image.png").read_bytes() == image.read_bytes()


def test_other_loggers_get_nothing(tmp_path, image):
    log_all(CSVLogger(tmp_path / "csv"), image)
    assert not (tmp_path / "csv").exists()


def test_a_failing_logger_is_a_warning(tmp_path, image):
    logger = TensorBoardLogger.__new__(TensorBoardLogger)  # not made: whatever it is asked for fails
    with pytest.warns(UserWarning, match="`samples/x` of TensorBoardLogger cannot be written"):
        log_table(logger, "samples/x", COLUMNS, ROWS, 7)


def test_markdown():
    assert markdown(["a", "b"], [["x|y\nz", 1.23456], [None, True]]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| x\\|y ⏎ z | 1.235 |",
        "|  | True |",
    ]
    assert markdown(["a"], [["<b>"]]).splitlines()[-1] == "| &lt;b> |"


class Recorder(WandbLogger):
    def __init__(self):
        self.sizes = []

    def log_table(self, key, columns, data, step):
        self.sizes.append(len(data))


def grown(sizes, last=None):
    recorder = Recorder()
    trainer, table = SimpleNamespace(loggers=[recorder], global_step=0), GrowingTable("x")
    for size in sizes:
        rows = [{"iteration": i} for i in range(size)]
        table.offer(trainer, size, lambda rows=rows: rows, last=size == last)
    return recorder.sizes


def test_growing_table_is_logged_when_it_has_grown_by_a_tenth_and_at_the_end():
    assert grown([1, 2, 2, 3]) == [1, 2, 3]
    assert grown([100, 105, 109, 111, 115]) == [100, 111]
    assert grown([100, 105, 105], last=105) == [100, 105]


def test_all_tables_of_a_long_run_are_little_more_than_the_last():
    sizes = grown(range(8, 8001, 8))
    assert sizes[-1] > 8000 / 1.1
    assert sum(sizes) < 11 * 8000


def test_growing_table_is_not_read_without_a_logger_that_shows_it(tmp_path):
    def read():
        raise AssertionError

    trainer = SimpleNamespace(loggers=[CSVLogger(tmp_path)], global_step=0)
    GrowingTable("x").offer(trainer, 5, read)


def test_thinned_keeps_whole_iterations_evenly_and_the_last():
    rows = [{"iteration": i, "row": j} for i in range(10) for j in range(2)]
    assert thinned(rows, 20) == rows
    assert [row["iteration"] for row in thinned(rows, 10)] == [1, 1, 3, 3, 5, 5, 7, 7, 9, 9]
    assert [row["iteration"] for row in thinned(rows, 7)] == [0, 0, 3, 3, 6, 6, 9, 9]
    assert thinned([], 5) == []
