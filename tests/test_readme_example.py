"""The README's example, taken from the README, run against the wheel in an empty folder; and what the wheel holds."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest

import lightning_rlhf

ROOT = Path(__file__).parents[1]
NEEDED = ["__init__.py", "train.py", "pretrained.py", "rewards.py", "py.typed", "modules/ppo.py", "datamodules/base.py"]


def execute(*command: str | Path, **kwargs) -> str:
    """Run a command to its end; its output, or a failure that shows its last words."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the tree, without what git ignores."""
    if not (ROOT / ".git").exists():
        pytest.skip("git says which files belong to the tree")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = execute("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    execute(sys.executable, "-m", "pip", "wheel", *offline, "-w", target, source)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel's files and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    offline = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    execute(sys.executable, "-m", "pip", "install", *offline, "--target", folder, wheel)
    return folder


def environment(installed: Path) -> dict[str, str]:
    """PYTHONPATH comes before the checkout's editable install; nothing may reach for the hub."""
    return os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def example() -> str:
    """The one block of README.md that begins with `# example.py`."""
    blocks = re.findall(r"^```python\n(# example\.py\n.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 1
    return blocks[0]


class TestWheel:
    def test_holds_what_users_need(self, wheel):
        names = set(zipfile.ZipFile(wheel).namelist())
        configs = [path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")]
        assert len(configs) >= 7
        assert {f"lightning_rlhf/{name}" for name in [*NEEDED, *configs]} <= names
        modules = {f"lightning_rlhf/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("[a-z]*/*.py")}
        outside = ("tests/", "benchmarks/", "build/", "runs/")
        assert {name for name in modules if not name.removeprefix("lightning_rlhf/").startswith(outside)} <= names

    def test_holds_nothing_else(self, wheel):
        names = zipfile.ZipFile(wheel).namelist()
        tops = {"lightning_rlhf", f"lightning_rlhf-{lightning_rlhf.__version__}.dist-info"}
        assert {name.split("/")[0] for name in names} == tops
        assert not [name for name in names if re.search(r"test|benchmark|runs/|wandb/|\.ckpt|\.ci|Makefile", name)]

    def test_declares_the_command_line_and_the_licence(self, installed):
        (metadata,) = installed.glob("*.dist-info")
        distribution = Distribution.at(metadata)
        (command,) = distribution.entry_points
        assert (command.name, command.value, command.group) == (
            "lightning-rlhf",
            "lightning_rlhf.train:main",
            "console_scripts",
        )
        assert distribution.version == lightning_rlhf.__version__
        assert distribution.metadata["License-Expression"] == "Apache-2.0"
        assert (metadata / "licenses/LICENSE").is_file()


class TestExample:
    def test_is_short(self):
        assert len(example().splitlines()) <= 45
        assert max(map(len, example().splitlines())) <= 120

    def test_uses_the_modules_under_a_plain_trainer(self):
        assert "from lightning_rlhf.modules import PPOModule, RewardModule, SFTModule\n" in example()
        assert "from lightning_rlhf.datamodules import " in example()
        assert "L.Trainer(" in example()

    def test_runs_on_the_installed_wheel(self, installed, tiny_model, tmp_path):
        settings = {"env": environment(installed), "cwd": tmp_path}
        (tmp_path / "example.py").write_text(example())
        printed = execute(sys.executable, "example.py", tiny_model, **settings)
        for folder in ("sft", "reward", "policy"):
            assert (tmp_path / folder / "model.safetensors").is_file()
        samples = [line for line in printed.splitlines() if re.match(r" *-?\d+\.\d\d  ", line)]
        assert len(samples) >= 8

    def test_the_wheel_is_what_runs_here_and_its_command_works(self, installed, tmp_path):
        settings = {"env": environment(installed), "cwd": tmp_path}
        config = installed / "lightning_rlhf/configs/demo/ppo.yaml"
        start = "from lightning_rlhf import train; print('#', train.__file__); train.main()"
        printed = execute(sys.executable, "-c", start, "fit", "--config", config, "--print_config", **settings)
        assert printed.startswith(f"# {installed}/lightning_rlhf/train.py")
        assert "class_path: lightning_rlhf.modules.PPOModule" in printed
