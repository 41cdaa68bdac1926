"""One rank fails: all ranks end within a minute, and the first error is the last thing on the screen.

With Lightning's launcher the main process is rank 0 and starts the others. By itself Lightning kills all of them, the
main process included, once a rank has ended with an error; what is seen last is then often another rank's complaint
that its connection is gone. Here each rank notes its error in a folder that the main process has made, and the main
process waits, ends the rest and says what came first. Under `torchrun` that is torchrun's own work.

A ValueError from one of this project's checks is told in a line; LIGHTNING_RLHF_TRACEBACK=1 shows where it came from.
"""

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import lightning as L
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

FOLDER = "LIGHTNING_RLHF_FAILURES"
TRACEBACK = "LIGHTNING_RLHF_TRACEBACK"
MAIN_SECONDS = 20.0  # for the main process to end by itself after a rank's failure: it has loggers to close
RANK_SECONDS = 3.0  # for the other ranks after the main process's failure, and again after SIGTERM
END_SECONDS = 60.0  # for the other ranks after a main process that did not fail
NO_FAILURE = {0, 130, -signal.SIGINT, 143, 128 + getattr(signal, "SIGUSR1", 10)}  # Ctrl-C, and the Preemption callback


class Failure(NamedTuple):
    """How a rank failed: by an exception, or it died without one."""

    rank: int
    pid: int
    time: float
    died: bool
    error: str
    details: str = ""
    """The traceback; none for what an error message says in full."""


def guard(run: Callable[[], Any]) -> Any:
    """Run the command line of this process, whichever rank it is."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        return record(run, FirstErrorFirst())()
    if FOLDER in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        return follow(run, Path(os.environ[FOLDER]))
    return lead(run)


class FirstErrorFirst(ErrorHandler):
    """For torchrun, which takes the first error by its time in whole seconds, and the lowest rank if they are equal."""

    def record_exception(self, e: BaseException) -> None:
        """Write torchrun's error file; not in the same second as another rank's."""
        own = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        if any(path != own for path in own.parents[1].glob(f"*/{own.name}")):
            time.sleep(2)
        super().record_exception(e)


class NoteFailure(L.Callback):
    """Notes an exception at once: the teardown that follows may wait for ranks that never come."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        note(exception)


# --- what each rank does ----------------------------------------------------------------------------------------------


def note(error: BaseException) -> None:
    """Write this rank's failure where the main process will find it; the first one counts."""
    if FOLDER not in os.environ or not isinstance(error, Exception):
        return
    file = Path(os.environ[FOLDER], f"{os.getpid()}.json")
    if file.exists():
        return
    failure = Failure(rank_zero_only.rank or 0, os.getpid(), time.time(), False, *described(error))
    with contextlib.suppress(OSError):  # the main process is gone, and the folder with it
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(failure))
        unfinished.rename(file)


def described(error: Exception) -> tuple[str, str]:
    """An error in short, and the traceback that helps: where a user's function failed, or all of it."""
    if not is_complaint(error):
        return "".join(traceback.format_exception_only(error)).strip(), "".join(traceback.format_exception(error))
    cause = error.__cause__
    shown = cause is not None and any(is_users(frame) for frame, _ in traceback.walk_tb(cause.__traceback__))
    return str(error), "".join(traceback.format_exception(cause)) if shown else ""


def is_complaint(error: BaseException) -> bool:
    """Whether it is a ValueError that this project's code raised, to tell the user what is wrong with the input."""
    if not isinstance(error, ValueError) or error.__traceback__ is None or os.environ.get(TRACEBACK):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return is_ours(frame)


def is_ours(frame: FrameType) -> bool:
    """Whether it runs this project's code."""
    return frame.f_globals.get("__name__", "").startswith("lightning_rlhf.")


def is_users(frame: FrameType) -> bool:
    """Whether it runs code that is neither ours nor installed."""
    installed = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    return not is_ours(frame) and not frame.f_code.co_filename.startswith((*installed, "<"))


def follow(run: Callable[[], Any], folder: Path) -> Any:
    """Run as one of the ranks that the main process has started."""
    main_process = int(folder.name.rpartition("-")[2])
    threading.Thread(target=leave_after, args=(main_process, folder), daemon=True).start()
    try:
        return run()
    except SystemExit as stopped:
        if isinstance(stopped.__context__, KeyboardInterrupt):
            sys.exit(130)  # Lightning makes it 1
        raise
    except Exception as error:
        note(error)
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(0.5)
        if os.getppid() != main_process:  # the error is that it is gone
            leave_after(main_process, folder)
        os._exit(1)  # a regular end may wait for collectives


def leave_after(main_process: int, folder: Path) -> NoReturn:
    """Wait for the end of the main process, which ends the other ranks unless it was killed itself; then leave, too."""
    while os.getppid() == main_process:
        time.sleep(1)
    with contextlib.suppress(OSError):
        folder = folder.rename(folder.with_name(f"{folder.name}-gone"))  # one rank succeeds, and speaks for all
        killed = Failure(0, main_process, 0.0, True, "was killed; unless by hand, out of memory is the usual reason")
        failures = noted(folder)
        report(failures if any(failure.pid == main_process for failure in failures) else [killed, *failures])
        shutil.rmtree(folder)
    os._exit(1)


def noted(folder: Path) -> list[Failure]:
    """The failures that ranks have noted, the first first."""
    failures = [Failure(*json.loads(file.read_text())) for file in folder.glob("*.json")]
    return sorted(failures, key=lambda failure: failure.time)


# --- what the main process does ---------------------------------------------------------------------------------------


def lead(run: Callable[[], Any]) -> Any:
    """Run as the main process, which may start others, or be the only one."""
    suffix = f"-{os.getpid()}"
    with TemporaryDirectory(prefix="lightning-rlhf-", suffix=suffix, ignore_cleanup_errors=True) as folder:
        os.environ[FOLDER] = folder
        ranks = Ranks(Path(folder))
        with ranks.observed():
            try:
                result = run()
                failures = ranks.end(END_SECONDS)
            except SystemExit as stopped:  # of all ranks, by the Preemption callback or Ctrl-C
                ranks.end(END_SECONDS)
                close_wandb(stopped.code)
                raise
            except Exception as error:
                note(error)
                failures = ranks.end(RANK_SECONDS)
                close_wandb(1)
                if not ranks.processes and not is_complaint(error):
                    raise
    if not failures:
        return result
    report(failures, alone=not ranks.processes)
    if ranks.processes:  # Python's own end may wait for collectives
        faulthandler.dump_traceback_later(MAIN_SECONDS, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    sys.exit(1)


class Ranks:
    """The processes that Lightning's launcher has started, all ranks of this machine but the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen] = []
        self._deaths: dict[int, Failure] = {}
        self._lock = threading.Lock()
        self._ending = False

    @contextlib.contextmanager
    def observed(self) -> Iterator[None]:
        """Watch the processes in place of Lightning's observer, which would kill this one, too."""
        theirs = subprocess_script._launch_process_observer
        subprocess_script._launch_process_observer = self.watch
        try:
            yield
        finally:
            subprocess_script._launch_process_observer = theirs

    def watch(self, processes: list[subprocess.Popen]) -> None:
        """Begin to watch these processes."""
        self.processes = list(processes)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(0.5)
            with self._lock:
                if self._ending:
                    return
                failures = self.failures()
                if failures and time.time() > failures[0].time + MAIN_SECONDS:
                    self.leave(failures)

    def leave(self, failures: list[Failure]) -> NoReturn:
        """End this process from a thread: the main thread hangs, for instance in a collective."""
        self.stop()
        report(failures)
        shutil.rmtree(self.folder)
        os._exit(1)

    def failures(self) -> list[Failure]:
        """What has failed so far, the first first."""
        first = int(os.environ.get("NODE_RANK", "0")) * (len(self.processes) + 1)
        for i, process in enumerate(self.processes, 1):
            if process.poll() is not None and process.pid not in self._deaths:
                # A second ago: it was before others noticed that it is gone.
                cause = cause_of_death(process.returncode)
                self._deaths[process.pid] = Failure(first + i, process.pid, time.time() - 1, True, cause)
        failures = noted(self.folder)
        told = {failure.pid for failure in failures}
        failures += [failure for pid, failure in self._deaths.items() if failure.error and pid not in told]
        return sorted(failures, key=lambda failure: failure.time)

    def end(self, seconds: float) -> list[Failure]:
        """Wait for the processes, for some seconds, and end those that are left; returns what has failed before."""
        with self._lock:
            self._ending = True
            deadline = time.time() + seconds
            while any(process.poll() is None for process in self.processes) and time.time() < deadline:
                time.sleep(0.05)
            failures = self.failures()
            self.stop()
        return failures

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for those that do not heed it."""
        for process in self.processes:
            process.terminate()
        deadline = time.time() + RANK_SECONDS
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.time(), 0))
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)


def cause_of_death(code: int) -> str:
    """An exit code in words; nothing if it tells no failure."""
    if code in NO_FAILURE:
        return ""
    if code > 0:
        return f"ended with exit code {code} and no error message"
    name = next((known.name for known in signal.Signals if known == -code), "unknown")
    usual = "; out of memory is the usual reason" if name == "SIGKILL" else ""
    return f"was killed by signal {-code} ({name}){usual}"


def report(failures: list[Failure], alone: bool = False) -> None:
    """Print the first error, and the others as its consequences."""
    first, *others = failures
    after: dict[str, list[str]] = {}
    for failure in others:
        error = "the same" if failure.error == first.error else failure.error.partition("\n")[0]
        after.setdefault(f"{'' if failure.died else 'failed: '}{error}", []).append(str(failure.rank))
    lines = ["", first.details] if first.details else [""]
    lines += [f"after that, rank {', '.join(ranks)} {error}" for error, ranks in after.items()]
    who = f"rank {first.rank} (process {first.pid}) {'' if first.died else 'failed first: '}"
    lines.append(f"error: {'' if alone else who}{first.error}")
    sys.stdout.flush()
    print("\n".join(lines), file=sys.stderr, flush=True)


def close_wandb(code: Any) -> None:
    """End a W&B run that an exception has left open, so that what W&B has to say is not said after the error."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        with contextlib.suppress(Exception):
            wandb.finish(exit_code=code if isinstance(code, int) else 1)
