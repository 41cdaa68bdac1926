"""Every recipe fits the constructors it names; nothing is built, nothing downloaded."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_rlhf.train import main

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def _own_arguments_only(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])  # Lightning warns if there are others beside those of `main`


def print_config(path: Path, capsys: pytest.CaptureFixture) -> dict:
    """What `fit --config PATH --print_config` prints: all values, parsed and checked; no class is built."""
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(path), "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def says(parsed: Any, written: Any) -> bool:
    """Whether a parsed value is what was written; classes come back with their whole path and their defaults."""
    if isinstance(parsed, dict) and isinstance(written, str):
        written = {"class_path": written}
    if not isinstance(written, dict):
        return parsed == written
    return all(
        parsed[key].rpartition(".")[2] == value.rpartition(".")[2] if key == "class_path" else says(parsed[key], value)
        for key, value in written.items()
    )


def test_there_is_a_recipe_for_every_method_on_gpus_and_on_this_machine():
    names = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in CONFIGS}
    pairs = {"dpo", "ipo", "simpo", "cpo", "orpo", "kto", "online_dpo"}
    groups = {"grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp", "rft"}
    methods = {"sft", "reward", "ppo"} | pairs | groups
    assert names >= methods | {f"demo/{name}" for name in methods} | {"demo/best_of_n", "reward_ratings"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
class TestEveryRecipe:
    def test_parses_and_keeps_what_it_says(self, path, capsys):
        parsed, written = print_config(path, capsys), yaml.safe_load(path.read_text())
        for part in ("model", "data"):
            for name, value in written[part]["init_args"].items():
                assert says(parsed[part]["init_args"][name], value)
        for name, value in written["trainer"].items():
            if name != "callbacks":
                assert parsed["trainer"][name] == value

    @pytest.mark.parametrize("part", ["model", "data", "trainer"])
    def test_a_misspelt_key_is_refused_by_name(self, path, part, tmp_path, capsys):
        config = yaml.safe_load(path.read_text())
        (config[part] if part == "trainer" else config[part]["init_args"])["no_such_key"] = 1
        copy = tmp_path / path.name
        copy.write_text(yaml.safe_dump(config))
        with pytest.raises(SystemExit) as stopped:
            main(["fit", "--config", str(copy)])
        assert stopped.value.code == 2
        assert "no_such_key" in capsys.readouterr().err

    def test_its_comments_name_the_command_that_runs_it(self, path):
        header = path.read_text().split("seed_everything")[0]
        assert f"python train.py fit --config {path.relative_to(ROOT).as_posix()}" in header

    def test_effective_minibatches_divide(self, path, capsys):
        config = print_config(path, capsys)
        init_args, accumulate = config["model"]["init_args"], config["trainer"]["accumulate_grad_batches"]
        if "rollout_batch_size" in init_args:
            rows, size = init_args["rollout_batch_size"], init_args["group_size"]
            name = config["model"]["class_path"].rpartition(".")[2]
            learned = {"RFTModule": rows // size, "OnlineDPOModule": 2 * rows // size}.get(name, rows)
            minibatches, rest = divmod(learned, init_args["minibatch_size"])
            assert rows % size == rest == 0
            assert minibatches % accumulate == 0


def test_stages_read_what_earlier_stages_write():
    for folder in (ROOT / "configs", ROOT / "configs/demo"):
        sft, reward, ppo = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("sft", "reward", "ppo"))
        sft_model = sft["trainer"]["default_root_dir"] + "/model"
        assert reward["model"]["init_args"]["model"] == ppo["model"]["init_args"]["model"] == sft_model
        rewards = ppo["model"]["init_args"]["reward"]
        rewards = rewards if isinstance(rewards, list) else [rewards]
        assert rewards[0] == reward["trainer"]["default_root_dir"] + "/model"


def test_a_config_works_from_any_folder(tmp_path, monkeypatch, capsys):
    copy = shutil.copy(ROOT / "configs/ppo.yaml", tmp_path / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    assert print_config(copy, capsys)["model"]["class_path"] == "lightning_rlhf.modules.PPOModule"
