"""Loggers that are sabotaged: a full disk, a server that is down or never answers, a service that dies."""

import errno
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger
from offline_wandb import OfflineRun
from torch.utils.data import DataLoader, TensorDataset

from lightning_rlhf import loggers
from lightning_rlhf.loggers import (
    MetricsFile,
    append_rows,
    close_wandb,
    forgiving,
    forgiving_io,
    read_rows,
    replace_rows,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture(autouse=True)
def _untold(monkeypatch):
    monkeypatch.setattr(loggers, "_told", set())


@pytest.fixture
def quiet_wandb(monkeypatch, tmp_path):
    for name, value in {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)


class Line(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.linear = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.linear(batch[0]).square().mean()
        self.log("train/loss", loss)
        self.log(f"train/new_{self.current_epoch}", 1.0, on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(make_trainer, logger, epochs=3, **options) -> torch.Tensor:
    module = Line()
    data = DataLoader(TensorDataset(torch.arange(8.0).view(4, 2) / 8), batch_size=1)
    make_trainer(max_epochs=epochs, logger=logger, log_every_n_steps=1, **options).fit(module, data)
    return module.linear.weight.detach().clone()


def texts(told) -> list[str]:
    return [str(one.message) for one in told if "cannot be written" in str(one.message)]


class FullDisk:
    """Opening a file of this name for writing, or writing to it, fails while `full`."""

    def __init__(self, monkeypatch, name: str, partly: int = 0) -> None:
        self.full, self.name, self.partly = True, name, partly
        opened = Path.open

        def open_(path, mode="r", *args, **kwargs):
            file = opened(path, mode, *args, **kwargs)
            if self.name in path.name and mode[0] in "wa":
                write = file.write

                def full(text):
                    if not self.full:
                        return write(text)
                    write(text[: self.partly])
                    file.flush()
                    raise OSError(errno.ENOSPC, "No space left on device")

                return Wrapped(file, full)
            return file

        monkeypatch.setattr(Path, "open", open_)


class Wrapped:
    def __init__(self, file, write):
        self.file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


class TestMetricsFile:
    def test_has_what_lightnings_own_has(self, make_trainer, tmp_path):
        trained(make_trainer, [MetricsFile(tmp_path / "ours"), CSVLogger(tmp_path, name="theirs", version="")])
        ours, theirs = ((tmp_path / name / "metrics.csv").read_text() for name in ("ours", "theirs"))
        assert ours == theirs
        rows = read_rows(tmp_path / "ours/metrics.csv")
        assert len(rows) == 3 * 4 + 3
        assert list(rows[0]) == ["epoch", "step", "train/loss", "train/new_0", "train/new_1", "train/new_2"]

    def test_full_disk_is_one_warning_and_no_row_is_lost(self, make_trainer, tmp_path, monkeypatch):
        bare = trained(make_trainer, False)
        disk = FullDisk(monkeypatch, "metrics.csv", partly=7)

        class Freed(L.Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                disk.full = trainer.current_epoch == 1

        logger = forgiving(MetricsFile(tmp_path / "run"))
        with pytest.warns(UserWarning, match="No space left") as told:
            weights = trained(make_trainer, logger, callbacks=[Freed()])
        assert [text.split(" (")[0] for text in texts(told)] == [
            "MetricsFile cannot be written, training goes on without it"
        ]
        assert torch.equal(weights, bare)
        rows = read_rows(tmp_path / "run/metrics.csv")
        losses = [row["step"] for row in rows if row["train/loss"]]
        assert losses == [str(step) for step in range(12)]
        assert [row["step"] for row in rows if row["train/new_1"]] == ["7"]  # its column came on the full disk

    def test_without_forgiveness_the_run_would_die(self, make_trainer, tmp_path, monkeypatch):
        FullDisk(monkeypatch, "metrics.csv")
        with pytest.raises(OSError, match="No space left"):
            trained(make_trainer, MetricsFile(tmp_path / "run"))

    def test_a_folder_that_cannot_be_made(self, make_trainer, tmp_path):
        (tmp_path / "file").write_text("")
        bare = trained(make_trainer, False)
        with pytest.warns(UserWarning, match="MetricsFile cannot be written"):
            assert torch.equal(trained(make_trainer, forgiving(MetricsFile(tmp_path / "file/run"))), bare)


class TestRows:
    def test_failed_append_leaves_the_file_as_it_was(self, tmp_path, monkeypatch):
        path = tmp_path / "rows.csv"
        replace_rows(path, ["a", "b"], [{"a": 1}])
        before = path.read_bytes()
        disk = FullDisk(monkeypatch, "rows.csv", partly=2)
        with pytest.raises(OSError, match="No space"):
            append_rows(path, ["a", "b"], [{"a": 2, "b": 3}])
        assert path.read_bytes() == before
        disk.full = False
        append_rows(path, ["a", "b"], [{"a": 2, "b": 3}])
        assert read_rows(path) == [{"a": "1", "b": ""}, {"a": "2", "b": "3"}]

    def test_failed_replacement_leaves_the_file_as_it_was(self, tmp_path, monkeypatch):
        path = tmp_path / "rows.csv"
        replace_rows(path, ["a"], [{"a": 1}])
        FullDisk(monkeypatch, "rows.csv", partly=2)
        with pytest.raises(OSError, match="No space"):
            replace_rows(path, ["a", "b"], [{"a": 1, "b": 2}])
        assert read_rows(path) == [{"a": "1"}]
        assert list(tmp_path.iterdir()) == [path]


class TestForgivingIO:
    def test_an_error_is_told_once(self):
        def fail():
            with forgiving_io("x.csv"):
                raise OSError("full")

        with pytest.warns(UserWarning, match=r"x\.csv cannot be written.*OSError: full") as told:
            fail()
        fail()  # a second warning would be an error
        assert len(texts(told)) == 1

    def test_other_errors_are_not_forgiven(self):
        with pytest.raises(KeyError), forgiving_io("x.csv"):
            raise KeyError


class Broken(Logger):
    """A logger of a server that is down: each call takes `seconds` of the clock, and fails while `down`."""

    name = version = "broken"

    def __init__(self, clock, seconds=0.0):
        super().__init__()
        self.clock, self.seconds, self.down, self.calls, self.logged = clock, seconds, True, 0, []

    @property
    def experiment(self):
        raise ConnectionError("no server")

    def log_metrics(self, metrics=None, step=None):
        self.calls += 1
        self.clock[0] += self.seconds
        if self.down:
            raise ConnectionError("no server")
        self.logged.append(step)

    log_hyperparams = finalize = save = log_metrics


class TestForgiving:
    def test_a_logger_whose_every_method_fails(self, make_trainer):
        bare = trained(make_trainer, False)
        with pytest.warns(UserWarning, match="Broken cannot be written") as told:
            assert torch.equal(trained(make_trainer, forgiving(Broken([0.0]))), bare)
        assert len(texts(told)) == 1

    def test_is_still_what_it_was(self, tmp_path):
        logger = forgiving(MetricsFile(tmp_path / "run"))
        assert isinstance(logger, CSVLogger)
        assert type(logger).__name__ == "MetricsFile"
        assert logger.log_dir == str(tmp_path / "run") + "/"

    def test_a_slow_dead_server_is_left_alone_for_a_while_and_then_asked_again(self, monkeypatch):
        clock = [100.0]
        monkeypatch.setattr(loggers.time, "monotonic", lambda: clock[0])
        logger = forgiving(Broken(clock, seconds=2.0))
        with pytest.warns(UserWarning, match="Broken"):
            logger.log_metrics({}, 0)  # ends at 102: paused until 122
        clock[0] = 121.9
        logger.log_metrics({}, 1)
        assert logger.calls == 1
        logger.down, clock[0] = False, 122.0
        logger.log_metrics({}, 2)
        assert (logger.calls, logger.logged) == (2, [2])


def test_mlflow_takes_names_within_names(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = forgiving(MLFlowLogger(tracking_uri=f"file:{tmp_path}/ml", experiment_name="x"))
    logger.log_metrics({"epoch": 0.0, "val/reward": 1.0, "val/reward/vader": 2.0}, step=3)
    (folder,) = (tmp_path / "ml").glob("*/*/metrics")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "epoch",
        "val/reward",
        "val/reward.vader",
    ]


@pytest.mark.usefixtures("quiet_wandb")
class TestWandb:
    def offline(self, root, **options):
        return forgiving(WandbLogger(offline=True, save_dir=root, project="test", **options))

    def test_a_run_is_written_as_usual(self, make_trainer, tmp_path):
        logger = self.offline(tmp_path)
        trained(make_trainer, logger)
        close_wandb([logger])
        assert [x for x, _ in OfflineRun(tmp_path).series("trainer/global_step", "train/loss")] == list(range(12))

    def test_time_limits_are_given_unless_the_user_has_set_them(self, tmp_path, monkeypatch):
        assert self.offline(tmp_path)._wandb_init["settings"] == {"init_timeout": 30.0, "finish_timeout": 300.0}
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
        assert self.offline(tmp_path)._wandb_init["settings"] == {"finish_timeout": 300.0}
        settings = {"finish_timeout": 1.0}
        assert self.offline(tmp_path, settings=settings)._wandb_init["settings"] == {"finish_timeout": 1.0}

    def test_a_full_disk_in_its_folder(self, make_trainer, tmp_path):
        (tmp_path / "file").write_text("")
        bare = trained(make_trainer, False)
        logger = self.offline(tmp_path)
        _ = logger.experiment

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        logger._experiment.log = full
        with pytest.warns(UserWarning, match="WandbLogger cannot be written.*No space left"):
            assert torch.equal(trained(make_trainer, logger), bare)
        close_wandb([logger])


UNREACHABLE = """
import os, sys, time
import lightning as L, torch
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader, TensorDataset
from lightning_rlhf.loggers import close_wandb, forgiving
sys.path.insert(0, {tests!r})
from test_loggers import Line

def fit(logger, **options):
    module = Line()
    data = DataLoader(TensorDataset(torch.arange(8.0).view(4, 2) / 8), batch_size=1)
    L.Trainer(accelerator="cpu", max_epochs=3, logger=logger, log_every_n_steps=1, enable_checkpointing=False,
              enable_progress_bar=False, enable_model_summary=False, **options).fit(module, data)
    return module.linear.weight.detach()

{body}
"""


def in_a_process(body: str, folder: Path, **environment: str) -> str:
    """Standard error of a script in a process of its own, as W&B keeps to what it was first told."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    kept |= {"HOME": str(folder), "WANDB_SILENT": "true", "WANDB_CONSOLE": "off", **environment}
    script = UNREACHABLE.format(tests=str(Path(__file__).parent), body=textwrap.dedent(body))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=kept, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


ONLINE = """
logger = forgiving(WandbLogger(save_dir=".", project="test", settings={"init_timeout": 1.0, "finish_timeout": 1.0}))
assert torch.equal(fit(logger), fit(False))
close_wandb([logger])
"""


class WandbServer(ThreadingHTTPServer):
    """As much of W&B as a run's start takes; afterwards it takes no upload, or is gone."""

    daemon_threads = True

    def __init__(self, then: str) -> None:
        super().__init__(("127.0.0.1", 0), WandbHandler)
        self.then, self.asked_for = then, []


class WandbHandler(BaseHTTPRequestHandler):
    """One request to it."""

    server: WandbServer

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked_for.append(self.path.rpartition("/")[2])
        if self.path != "/graphql":
            if self.server.then == "takes no upload":
                time.sleep(60)
            self.server.socket.close()
            return
        project = {"id": "p", "name": "test", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": "run", "displayName": "run", "config": "{}", "project": project}
        data = {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        data |= {"serverInfo": {"features": []}, "upsertBucket": {"bucket": bucket, "inserted": True}}
        data |= {"model": {"bucket": None}, "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        text = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Nothing on the screen."""


class TestWandbInAProcess:
    @pytest.mark.parametrize("answers", ["refuses", pytest.param("never answers", marks=pytest.mark.slow)])
    def test_a_server_that_is_down_at_the_start(self, answers, tmp_path):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            if answers == "never answers":
                server.listen(64)
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            said = in_a_process(ONLINE, tmp_path, WANDB_BASE_URL=url, WANDB_API_KEY="a" * 40)
        assert said.count("W&B cannot be reached, so this run is offline") == 1
        assert len(OfflineRun(tmp_path).series("trainer/global_step", "train/loss")) == 12

    @pytest.mark.parametrize("then", ["takes no upload", "is gone"])
    def test_a_server_that_fails_after_a_good_start(self, then, tmp_path):
        server = WandbServer(then)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        said = in_a_process(ONLINE, tmp_path, WANDB_BASE_URL=url, WANDB_API_KEY="a" * 40)
        server.server_close()
        assert server.asked_for.count("file_stream") >= 1  # it came as far as uploading
        assert "Traceback" not in said
        left = OfflineRun(tmp_path, "run")  # what was not uploaded is on disk, for `wandb sync`
        assert [x for x, _ in left.series("trainer/global_step", "train/loss")] == list(range(12))

    def test_its_service_dies_during_the_run(self, tmp_path):
        said = in_a_process(
            """
            import signal, subprocess
            class Kill(L.Callback):
                def on_train_epoch_start(self, trainer, pl_module):
                    if trainer.current_epoch == 1:
                        found = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True)
                        for child in found.stdout.split():
                            if "wandb-core" in open(f"/proc/{child}/cmdline").read():
                                os.kill(int(child), signal.SIGKILL)
                                time.sleep(1)
                                print("killed", file=sys.stderr)
            logger = forgiving(WandbLogger(offline=True, save_dir=".", project="test"))
            assert torch.equal(fit(logger, callbacks=[Kill()]), fit(False))
            close_wandb([logger])
            """,
            tmp_path,
        )
        assert "killed" in said
        assert said.count("WandbLogger cannot be written") == 1
