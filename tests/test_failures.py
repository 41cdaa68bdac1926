"""One rank of several fails: every process ends soon, and the first error is what is read last."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lightning_rlhf import failures, train
from lightning_rlhf.failures import FOLDER, TRACEBACK, Failure, FirstErrorFirst, Ranks
from lightning_rlhf.modules.text_module import require

ROOT = Path(__file__).parents[1]
REWARD = """
import os, signal, time
calls = 0

def reward(prompts, responses, **columns):
    global calls
    calls += 1
    if calls == 2 and os.environ["LOCAL_RANK"] == os.environ["FAILING"]:
        print("failing at", time.time(), flush=True)
        if os.environ["HOW"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the scale is broken")
    return [1.0 for _ in responses]
"""
PPO = ["--model=PPOModule", "--model.reward=broken.reward", "--model.max_new_tokens=2", "--model.lr_scheduler=constant"]
SIZES = ["--model.rollout_batch_size=2", "--model.minibatch_size=2", "--model.num_passes=1", "--data.batch_size=1"]
TRAINER = ["accelerator=cpu", "devices=2", "strategy=ddp", "logger=false", "max_epochs=3", "default_root_dir=run"]


@pytest.fixture
def fit(tmp_path, tiny_model):
    """Runs PPO on two ranks, one of which fails in its second rollout; returns exit code, output and seconds to end."""
    (tmp_path / "broken.py").write_text(REWARD)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "good day"}\n')
    data = ["--data=PromptDataModule", "--data.data=prompts.jsonl", f"--model.model={tiny_model}"]
    flags = ["fit", *PPO, *data, *SIZES, *(f"--trainer.{flag}" for flag in TRAINER)]

    def run(failing, how, launcher=(sys.executable,)):
        case = {"FAILING": str(failing), "HOW": how, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        command = [*launcher, str(ROOT / "train.py"), *flags]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        with subprocess.Popen(command, cwd=tmp_path, env=os.environ | case, **options) as process:
            try:
                said, _ = process.communicate(timeout=150)  # until all processes that could write have ended
                ended = time.time()
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        assert "failing at" in said, said
        failed = float(said.partition("failing at ")[2].split()[0])
        return process.returncode, said, ended - failed

    return run


class TestTwoRanks:
    @pytest.mark.parametrize("rank", [0, 1])
    def test_an_exception(self, rank, fit):
        code, said, seconds = fit(rank, "raise")
        assert code == 1
        assert seconds < 60
        last = said.splitlines()[-1]
        assert f"error: rank {rank} (process " in last
        assert "failed first: The reward function `reward` failed on 2 samples" in last
        assert last.endswith("RuntimeError: the scale is broken")
        assert said.count('raise RuntimeError("the scale is broken")') == 1
        assert said.count("Traceback") == 1

    def test_a_kill(self, fit):
        code, said, seconds = fit(1, "kill")
        assert code == 1
        assert seconds < 60
        assert "error: rank 1 (process " in said.splitlines()[-1]
        assert "was killed by signal 9 (SIGKILL); out of memory is the usual reason" in said.splitlines()[-1]
        assert "Traceback" not in said

    def test_the_main_process_is_killed(self, fit):
        code, said, seconds = fit(0, "kill")
        assert code == -signal.SIGKILL
        assert seconds < 60
        assert "error: rank 0 (process " in said.splitlines()[-1]

    def test_under_torchrun(self, fit):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        code, said, seconds = fit(1, "raise", torchrun)
        assert code == 1
        assert seconds < 60
        _, _, cause = said.rpartition("Root Cause (first observed failure):")
        assert "rank      : 1" in cause
        assert "RuntimeError: the scale is broken" in cause


@pytest.fixture
def exits(monkeypatch):
    """Codes with which `os._exit` was called; instead the thread goes no further."""
    codes = []

    def leave(code):
        codes.append(code)
        if threading.current_thread() is threading.main_thread():
            raise SystemExit(code)
        threading.Event().wait()

    monkeypatch.setattr(failures.os, "_exit", leave)
    return codes


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Two other ranks that run some Python each."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "notes"
    folder.mkdir()
    monkeypatch.setenv(FOLDER, str(folder))
    monkeypatch.setattr(failures, "RANK_SECONDS", 0.3)
    watched, processes = Ranks(folder), []

    def start(*programs):
        processes.extend(subprocess.Popen([sys.executable, "-c", program]) for program in programs)
        watched.processes = processes
        return watched

    yield start
    for process in processes:
        process.kill()
        process.wait()


IGNORES = """
import pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path("ready").touch()
time.sleep(100)
"""


class TestRanks:
    def test_those_that_do_not_heed_sigterm_are_killed(self, ranks):
        started = ranks(IGNORES, "import time; time.sleep(100)")
        while not Path("ready").exists():
            time.sleep(0.01)
        assert started.end(0.1) == []
        assert [process.returncode for process in started.processes] == [-signal.SIGKILL, -signal.SIGTERM]

    def test_a_death_comes_before_what_others_say_of_it(self, ranks):
        started = ranks("import os; os.kill(os.getpid(), 11)", "raise SystemExit(3)")
        for process in started.processes:
            process.wait()
        failures.note(RuntimeError("connection closed"))
        found = started.end(0.0)
        assert [failure.rank for failure in found] == [1, 2, 0]
        assert [failure.error for failure in found] == [
            "was killed by signal 11 (SIGSEGV)",
            "ended with exit code 3 and no error message",
            "RuntimeError: connection closed",
        ]

    def test_a_regular_end_and_a_preempted_one_are_no_failures(self, ranks):
        assert ranks("", "raise SystemExit(143)").end(10.0) == []

    def test_a_main_process_that_hangs_is_ended(self, ranks, exits, monkeypatch, capsys):
        monkeypatch.setattr(failures, "MAIN_SECONDS", 0.5)
        started = ranks("raise SystemExit(7)", IGNORES)
        started.watch(started.processes)
        for _ in range(100):  # meanwhile this thread does what it likes
            if exits:
                break
            time.sleep(0.1)
        assert exits == [1]
        assert "rank 1" in capsys.readouterr().err.splitlines()[-1]
        assert all(process.wait(1) is not None for process in started.processes)

    def test_a_rank_leaves_after_the_main_process(self, ranks, exits, capsys):
        folder = ranks().folder
        failures.note(RuntimeError("connection closed"))
        with pytest.raises(SystemExit):
            failures.leave_after(1, folder)
        with pytest.raises(SystemExit):  # another rank says nothing more
            failures.leave_after(1, folder)
        after, last = capsys.readouterr().err.splitlines()[-2:]
        assert after == "after that, rank 0 failed: RuntimeError: connection closed"
        assert last == "error: rank 0 (process 1) was killed; unless by hand, out of memory is the usual reason"
        assert not folder.exists()


class TestReport:
    def test_one_line_for_the_same_error(self, capsys):
        failures.report([Failure(rank, 10 + rank, float(rank), False, "no rows") for rank in range(3)])
        assert capsys.readouterr().err.splitlines()[-2:] == [
            "after that, rank 1, 2 failed: the same",
            "error: rank 0 (process 10) failed first: no rows",
        ]

    def test_a_complaint_of_ours_needs_no_traceback(self, monkeypatch):
        error = caught(require, "gamma", False, "at most 1", 2)
        assert failures.described(error) == ("`gamma` must be at most 1, but got 2.", "")
        monkeypatch.setenv(TRACEBACK, "1")
        summary, details = failures.described(error)
        assert summary.startswith("ValueError: `gamma`")
        assert "in require" in details

    def test_other_errors_do(self):
        summary, details = failures.described(caught(int, "x"))
        assert summary.startswith("ValueError: invalid literal")
        assert "in caught" in details


def caught(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        return error


class TestOneProcess:
    def test_a_complaint_is_said_in_a_line(self, monkeypatch, capsys, tmp_path):
        monkeypatch.chdir(tmp_path)
        data = ["--data=SFTDataModule", "--data.data=nowhere.jsonl", "--trainer.logger=false", "--trainer.max_epochs=1"]
        monkeypatch.setattr("sys.argv", ["train.py", "fit", "--model=SFTModule", "--model.model=lm", *data])
        with pytest.raises(SystemExit) as stopped:
            train.main()
        assert stopped.value.code == 1
        said = capsys.readouterr().err
        assert "no such file" in said.splitlines()[-1]
        assert said.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in said

    @pytest.mark.parametrize("error", [KeyError("x"), ValueError("from elsewhere"), KeyboardInterrupt(), SystemExit(2)])
    def test_other_exceptions_are_left_alone(self, error, monkeypatch):
        def run():
            raise error

        monkeypatch.setattr(train, "run", run)
        with pytest.raises(type(error)) as raised:
            train.main()
        assert raised.value is error

    def test_a_console_script_ends_with_code_0(self, monkeypatch):
        monkeypatch.setattr(train, "run", object)
        assert train.main() is None


class TestTorchrun:
    def test_a_second_error_is_told_a_second_later(self, tmp_path, monkeypatch):
        waited = []
        monkeypatch.setattr(failures.time, "sleep", waited.append)
        for rank in ("1", "0"):
            (tmp_path / rank).mkdir()
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
            FirstErrorFirst().record_exception(RuntimeError(f"of rank {rank}"))
        assert waited == [2]
        assert "of rank 0" in json.loads((tmp_path / "0/error.json").read_text())["message"]["message"]
