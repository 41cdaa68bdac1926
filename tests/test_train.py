"""Where a command line begins: what is quick, what is imported for the rest, and how errors are told."""

import gc
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import rollout_rows, write_csv

from lightning_rlhf import cli, train
from lightning_rlhf.commands import COMMANDS, QUICK
from lightning_rlhf.export import export

SLOW = {"torch", "lightning", "transformers", "peft", "datasets", "wandb"}
TELL = "import atexit, sys; atexit.register(lambda: print('imported', *sys.modules)); "
RUN = "import lightning_rlhf.train as train; train.main()"


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A folder of a run, enough for a report."""
    write_csv(tmp_path / "run" / "metrics.csv", rollout_rows())
    return tmp_path / "run"


def command_line(*flags: str, code: str = RUN) -> subprocess.CompletedProcess:
    """What a process of its own says to these flags."""
    return subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)


def imported_by(*flags: str) -> set[str]:
    """Packages that a process has imported at its end."""
    done = command_line(*flags, code=TELL + RUN)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()[1:]}


@pytest.fixture
def started_with(monkeypatch):
    """`main()` with these flags, in this process; what it would run is replaced by `instead`."""

    def start(*flags, instead=None):
        monkeypatch.setattr("sys.argv", ["train.py", *flags])
        if instead is not None:
            monkeypatch.setattr(train, "run", instead)
        return train.main()

    yield start
    gc.unfreeze()


class TestWhatIsQuick:
    @pytest.mark.parametrize("flag", ["-h", "--help"])
    def test_the_help_imports_hardly_anything(self, flag):
        imported = imported_by(flag)
        assert "argparse" in imported  # these names are those of packages
        assert not imported & {*SLOW, "numpy", "jinja2", "yaml", "jsonargparse"}

    def test_nor_does_the_help_of_report(self):
        assert not imported_by("report", "--help") & SLOW

    def test_nor_does_a_report(self, run_folder):
        imported = imported_by("report", str(run_folder))
        assert "matplotlib" in imported
        assert not imported & SLOW
        assert (run_folder / "report.html").is_file()

    def test_the_rest_is_known_by_these_imports(self):
        assert imported_by("export", "--help") >= SLOW - {"wandb"}  # these are their names

    def test_the_script_itself_is_as_quick(self):
        script = [sys.executable, "-X", "importtime", str(Path(train.__file__)), "--help"]
        done = subprocess.run(script, capture_output=True, text=True, check=True)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "argparse" in imported
        assert not imported & SLOW


class TestTheHelp:
    def test_names_every_command_there_is(self, capsys):
        assert list(COMMANDS) == [*cli.CLI.subcommands(), "export", "report", "workspace"]
        assert {*cli.NOT_THE_TRAINERS, *QUICK} - {"-h", "--help"} == COMMANDS.keys() - cli.CLI.subcommands().keys()
        with pytest.raises(SystemExit) as stopped:
            train.main(["--help"])
        assert stopped.value.code == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        for name, text in COMMANDS.items():
            assert [name, *text.split()[:4]] in [words[:5] for words in lines]

    def test_says_of_export_what_its_docstring_says(self):
        assert COMMANDS["export"] == inspect.getdoc(export).partition("\n")[0]

    def test_an_unknown_command_is_refused_with_those_that_exist(self, capsys, monkeypatch):
        monkeypatch.setattr("sys.argv", ["train.py"])
        with pytest.raises(SystemExit) as stopped:
            train.main(["ft"])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert "'ft'" in said
        assert [name for name in COMMANDS if f"'{name}'" not in said] == []

    def test_the_trainers_own_help_lists_the_others_too(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("sys.argv", ["train.py"])
        (tmp_path / "empty.yaml").write_text("{}\n")
        with pytest.raises(SystemExit):
            train.main([f"--config={tmp_path / 'empty.yaml'}", "--help"])
        assert f"workspace           {COMMANDS['workspace']}" in capsys.readouterr().out


class TestReport:
    @pytest.mark.parametrize(
        ("flags", "said"),
        [([], "required: folders"), (["run", "--outptu=x"], "unrecognized arguments: --outptu=x")],
    )
    def test_bad_flags_are_named_in_a_line(self, flags, said, capsys):
        with pytest.raises(SystemExit) as stopped:
            train.main(["report", *flags])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert said in line

    def test_a_complaint_is_said_in_a_line(self, started_with, capsys):
        with pytest.raises(SystemExit) as stopped:
            started_with("report", "nowhere")
        assert stopped.value.code == 1
        said = capsys.readouterr().err
        assert said.splitlines()[-1].startswith("error: `folders` must be runs or hold runs, but nowhere")
        assert "Traceback" not in said

    def test_what_is_no_complaint_has_its_traceback(self, run_folder):
        page = run_folder / "report.html"
        page.mkdir()  # so that it cannot be written
        done = command_line("report", str(run_folder))
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("IsADirectoryError")

    def test_a_report_is_made_once(self, started_with, monkeypatch):
        made = []
        monkeypatch.setitem(QUICK, "report", made.append)
        assert started_with("report", "run") is None
        assert made == [["run"]]


class TestGarbage:
    def test_what_is_imported_is_never_searched_for_it(self, started_with):
        seen = []
        gc.unfreeze()
        started_with("fit", instead=lambda: seen.append((gc.isenabled(), gc.get_freeze_count())))
        ((enabled, frozen),) = seen
        assert enabled
        assert frozen > 100_000

    def test_callers_in_python_keep_their_own_settings(self, monkeypatch):
        gc.unfreeze()
        monkeypatch.setattr(cli, "run", lambda args: (args, gc.isenabled(), gc.get_freeze_count()))
        assert train.main(["fit"]) == (["fit"], True, 0)
