"""The command line as users meet it: every subcommand, what a run leaves behind, and what is said about bad input."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf.callbacks import KLAlarm
from lightning_rlhf.cli import default_callbacks
from lightning_rlhf.modules import PPOModule, RewardModule, SFTModule
from lightning_rlhf.modules.scorer import Scorer
from lightning_rlhf.train import main

pytestmark = [  # Lightning's advice about runs as short as these
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:`max_epochs` was not set"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all targets"),
]
ROOT = Path(__file__).parents[1]
ROWS = {
    "texts": [{"text": text} for text in ("hello there", "good day", "how are you", "fine, thanks")],
    "pairs": [{"prompt": f"q{i}", "chosen": " yes, sir" * (i + 1), "rejected": " no"} for i in range(4)],
    "ratings": [{"text": f"text {i}", "ratings": [i, i + 1, 2]} for i in range(4)],
    "prompts": [{"prompt": prompt} for prompt in ("hello", "good", "how are", "fine,")],
}
FUNCTION = "lightning_rlhf.rewards.vader_compound"
PPO = ["--model.rollout_batch_size=4", "--model.minibatch_size=2", "--model.num_passes=2", "--model.max_new_tokens=4"]
REWARD_MODEL = ["--model.reward=reward/model", "--model.value_model=reward/model"]  # a separate value network, too
CASES = {  # (module, its flags, DataModule, rows)
    "sft": ("SFTModule", ["--model.max_new_tokens=4"], "SFTDataModule", "texts"),
    "pairs": ("RewardModule", [], "PreferenceDataModule", "pairs"),
    "ratings": ("RewardModule", ["--model.gaps=[1.0]"], "RatingDataModule", "ratings"),
    "ppo_function": ("PPOModule", [*PPO, f"--model.reward={FUNCTION}"], "PromptDataModule", "prompts"),
    "ppo_model": ("PPOModule", [*PPO, *REWARD_MODEL], "PromptDataModule", "prompts"),
}


@pytest.fixture(scope="session")
def reward_folder(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    with torch.random.fork_rng():
        Scorer.load(tiny_model, "float32").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, tiny_model, reward_folder) -> Path:
    """The current folder: data files, a language model in `lm`, a reward model in `reward/model`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])  # Lightning warns if there are others beside those of `main`
    for name, rows in ROWS.items():
        write(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "lm").symlink_to(tiny_model)
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward/model").symlink_to(reward_folder)
    return tmp_path


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def flags(case: str) -> list[str]:
    module, own, data_module, rows = CASES[case]
    data = ["--data", data_module, f"--data.data={rows}.jsonl", f"--data.val_data={rows}.jsonl", "--data.batch_size=2"]
    return ["--model", module, "--model.model=lm", "--model.lr_scheduler=constant", *own, *data]


def run(subcommand: str, *arguments: str):
    """`train.py` in this process; returns the CLI object."""
    quiet = [
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.logger=false",
        "--trainer.enable_model_summary=false",
        "--trainer.default_root_dir=run",
    ]
    fit = ["--trainer.log_every_n_steps=1", "--trainer.max_epochs=1"] if subcommand == "fit" else []
    return main([subcommand, *quiet, *fit, *arguments])


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What the parser says to arguments that it refuses."""
    with pytest.raises(SystemExit) as stopped:
        run("fit", *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def read_csv(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("case", CASES)
class TestEveryModule:
    def test_fit_leaves_its_results(self, case):
        run("fit", *flags(case))
        summary = json.loads(Path("run/summary.json").read_text())
        rows = read_csv("run/metrics.csv")
        config = yaml.safe_load(Path("run/config.yaml").read_text())
        assert summary["rollout/reward" if case.startswith("ppo") else "train/loss"] is not None
        assert any(name.startswith("val/") for name in summary)
        assert rows
        assert config["model"]["class_path"] == f"lightning_rlhf.modules.{CASES[case][0]}"
        assert Path("run/checkpoints/last.ckpt").is_file()
        auto = AutoModelForSequenceClassification if CASES[case][0] == "RewardModule" else AutoModelForCausalLM
        assert auto.from_pretrained("run/model").num_parameters() > 1000
        assert AutoTokenizer.from_pretrained("run/model").eos_token == "<eos>"
        assert Path("run/samples.csv").exists() == case.startswith("ppo")
        assert not list(Path("run").rglob("wandb"))

    def test_later_stages_take_the_checkpoint_and_destroy_nothing(self, case):
        run("fit", *flags(case))
        before = contents("run")
        validated = run("validate", *flags(case), "--ckpt_path=last")
        tested = run("test", *flags(case), "--ckpt_path=last")
        after = contents("run")
        fitted, both = json.loads(before.pop("run/summary.json")), json.loads(after.pop("run/summary.json"))
        assert both.items() >= fitted.items()
        assert any(name.startswith("test/") for name in both)
        assert after.items() >= before.items()
        diagram = {f"run/test_reliability.{end}" for end in ("csv", "png") if CASES[case][0] == "RewardModule"}
        assert set(after) - set(before) == {"run/validate/metrics.csv", "run/test/metrics.csv"} | diagram
        key = "val/perplexity" if case == "sft" else "val/agreement" if "ppo" not in case else "val/reward"
        assert validated.trainer.callback_metrics[key].item() == pytest.approx(fitted[key])
        assert tested.trainer.callback_metrics[key.replace("val", "test")].item() == pytest.approx(fitted[key])

    def test_predict_writes_json_lines(self, case):
        data = [] if case != "sft" else ["--data=PromptDataModule", "--data.data=prompts.jsonl"]
        data += [] if case != "sft" else ["--data.val_data=prompts.jsonl"]
        given = [flag for flag in flags(case) if not (data and "data" in flag.lower())]
        run("predict", *given, *data)
        rows = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
        keys = {"prompt", "response"} if case == "sft" else {"prompt", "response", "reward"}
        keys = {"text", "score"} if CASES[case][0] == "RewardModule" else keys
        assert {frozenset(row) for row in rows} == {frozenset(keys)}
        assert len(rows) == (8 if case == "pairs" else 4)
        if "prompt" in keys:
            assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS["prompts"]]

    def test_resumes_where_it_stopped(self, case):
        whole = run("fit", *flags(case), "--trainer.max_epochs=2", "--trainer.default_root_dir=whole")
        run("fit", *flags(case))
        first = Path("run/metrics.csv").read_bytes()
        resumed = run("fit", *flags(case), "--trainer.max_epochs=2", "--ckpt_path=last")
        assert Path("run/metrics_0.csv").read_bytes() == first
        assert resumed.trainer.global_step == whole.trainer.global_step
        assert resumed.trainer.current_epoch == 2
        weights = dict(resumed.model.named_parameters())
        for name, value in whole.model.named_parameters():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=0)


class TestParsing:
    def test_a_printed_config_gives_the_same_config(self, folder, capsys):
        configs = []
        for arguments in (flags("ppo_model"), ["--config", "printed.yaml"]):
            with pytest.raises(SystemExit):
                run("fit", *arguments, "--print_config")
            configs.append(capsys.readouterr().out)
            Path("printed.yaml").write_text(configs[-1])
        assert configs[0] == configs[1]
        assert yaml.safe_load(configs[0])["model"]["init_args"]["kl_coef"] == 0.05

    def test_a_saved_config_repeats_the_run_in_another_folder(self, folder):
        first = run("fit", *flags("sft"))
        before = contents("run")
        second = main(["fit", "--config=run/config.yaml", "--trainer.default_root_dir=again"])
        assert contents("run") == before
        assert Path("again/checkpoints/last.ckpt").is_file()
        for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_an_unknown_flag_is_named_with_those_that_exist(self, capsys):
        said = refused(capsys, *flags("sft"), "--model.learning_rte=1")
        assert "'learning_rte' is not accepted" in said
        assert "did you mean learning_rate?" in said
        assert "lora_r" in said
        assert len(said.splitlines()) < 8

    def test_an_unknown_trainer_flag_is_named(self, capsys):
        said = refused(capsys, *flags("sft"), "--trainer.max_stps=1")
        assert "--trainer.max_stps" in said
        assert "did you mean --trainer.max_steps?" in said
        Path("run.yaml").write_text("trainer:\n  max_stps: 1\n")
        said = refused(capsys, *flags("sft"), "--config=run.yaml")
        assert "trainer.max_stps" in said
        assert "did you mean --trainer.max_steps?" in said

    def test_an_argument_of_a_callback_that_does_not_exist(self, capsys):
        said = refused(capsys, *flags("sft"), "--trainer.callbacks=RunReport", "--trainer.callbacks.gld=x")
        assert "did you mean gold?" in said

    def test_a_wrong_type_is_named_with_the_right_one(self, capsys):
        said = refused(capsys, *flags("sft"), "--model.lora_r=five")
        assert "lora_r" in said
        assert "int" in said
        assert "five" in said
        said = refused(capsys, *flags("sft"), "--trainer.max_epochs=two")
        assert "trainer.max_epochs" in said
        assert "int" in said
        assert "two" in said

    def test_an_unknown_dtype_is_refused_with_those_that_exist(self, capsys):
        said = refused(capsys, *flags("sft"), "--model.dtype=float8")
        assert "float8" in said
        assert "'float32', 'bfloat16', 'float16'" in said

    @pytest.mark.parametrize(
        ("flag", "wrong"), [("model", "PPOModul"), ("data", "PromptDataModul"), ("trainer.callbacks", "RunReprt")]
    )
    def test_an_unknown_class_is_refused_with_those_that_exist(self, flag, wrong, capsys):
        said = refused(capsys, *flags("ppo_function"), f"--{flag}={wrong}")
        right = {"model": "PPOModule", "data": "PromptDataModule", "trainer.callbacks": "RunReport"}
        accepted = {"model": "RewardModule, SFTModule", "data": "RatingDataModule, SFTDataModule"}
        assert f"did you mean {right[flag]}?" in said
        assert accepted.get(flag, "ProgressBar, Provenance") in said

    def test_an_unknown_part_of_a_method_is_refused_with_those_that_exist(self, capsys):
        given = ["--model.model=x", "--data=PromptDataModule", "--data.data=x"]
        said = refused(capsys, "--model=GRPOModule", *given, "--model.advantage=LeaveOneAut")
        assert "did you mean LeaveOneOut?" in said
        assert "accepted: GroupCentered, GroupNormalized, LeaveOneOut, WhitenedGroupScores, WhitenedReturns" in said
        said = refused(capsys, "--model=OnlineDPOModule", *given, "--model.objective=DDO")
        assert "accepted: CPO, DPO, Hinge, IPO, ORPO, SimPO" in said

    def test_a_missing_required_argument_is_named(self, capsys):
        assert "required: model" in refused(capsys, "--model=SFTModule", "--data=SFTDataModule", "--data.data=x")

    def test_a_config_file_that_is_not_there(self, capsys):
        assert "nowhere.yaml" in refused(capsys, "--config=nowhere.yaml")


class TestCheckpoints:
    def test_flags_win_over_what_a_checkpoint_was_made_with(self, folder):
        run("fit", *flags("ppo_function"))
        shorter = run(
            "predict", *flags("ppo_function"), "--model.max_new_tokens=2", "--ckpt_path=run/checkpoints/last.ckpt"
        )
        assert shorter.model.hparams.max_new_tokens == 2

    def test_of_another_module_is_refused(self, folder):
        run("fit", *flags("ppo_function"))
        with pytest.raises(ValueError, match="written by PPOModule and does not fit this SFTModule"):
            run("fit", *flags("sft"), "--ckpt_path=run/checkpoints/last.ckpt")

    def test_that_is_not_there_is_named(self, folder):
        with pytest.raises((FileNotFoundError, ValueError), match=r"nowhere\.ckpt"):
            run("fit", *flags("sft"), "--ckpt_path=nowhere.ckpt")

    def test_of_a_reward_module_is_a_reward(self, folder):
        run("fit", *flags("ratings"), "--model.lora_r=2")
        run("fit", *flags("ppo_function"), "--model.reward=run/checkpoints/last.ckpt", "--trainer.default_root_dir=ppo")
        rows = read_csv("ppo/samples.csv")
        scorer, tokenizer = Scorer.load("run/model", "float32"), AutoTokenizer.from_pretrained("run/model")
        for row in rows:
            text = tokenizer(row["prompt"] + row["response"] + tokenizer.eos_token, return_tensors="pt")
            score = scorer(text["input_ids"], text["attention_mask"]).item()
            assert float(row["reward"]) == pytest.approx(score, abs=1e-4)


@pytest.fixture
def no_model_loads(monkeypatch) -> None:
    """Fails the test if weights are read: bad input has to be found before."""

    def reached(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr("lightning_rlhf.modules.text_module.load_causal_lm", reached)
    monkeypatch.setattr("lightning_rlhf.modules.rollout_module.load_causal_lm", reached)
    monkeypatch.setattr(Scorer, "load", reached)


@pytest.mark.usefixtures("no_model_loads")
class TestBadInputIsFoundBeforeAModelIsLoaded:
    def fails(self, case: str, *said: str, arguments: tuple[str, ...] = ()) -> None:
        with pytest.raises(ValueError, match=r".") as error:
            run("fit", *flags(case), *arguments)
        for part in said:
            assert part in str(error.value)
        assert "Union" not in str(error.value)

    def test_missing_file(self):
        self.fails("sft", "nowhere.jsonl", "no such file", "`data`", arguments=("--data.data=nowhere.jsonl",))

    @pytest.mark.parametrize(
        ("case", "rows", "said"),
        [
            ("sft", [], ["bad.jsonl", "no rows"]),
            ("sft", [{"words": "a"}], ["bad.jsonl", "['words']", "`text_column`"]),
            ("pairs", [{"chosen": "a b"}], ["bad.jsonl", "rejected", "`rejected_column`"]),
            ("ratings", [{"text": "a"}], ["bad.jsonl", "ratings", "`ratings_column`"]),
            ("ppo_function", [{"words": "a"}], ["bad.jsonl", "prompt", "`prompt_column`"]),
            ("sft", [{"text": "fine"}, {"text": 3}], ["bad.jsonl"]),
            ("sft", [{"text": 1}, {"text": 3}], ["bad.jsonl", "row 0", "text"]),
            ("sft", [{"text": "fine"}, {"text": None}], ["bad.jsonl", "row 1", "text"]),
            ("sft", [{"text": "fine"}, {"text": ""}], ["bad.jsonl", "row 1", "text"]),
            ("sft", [{"prompt": "a", "completion": ""}], ["bad.jsonl", "row 0", "completion"]),
            ("pairs", [{"chosen": "", "rejected": "b"}], ["bad.jsonl", "row 0", "chosen"]),
            ("pairs", [{"prompt": "a", "chosen": "b", "rejected": "b"}], ["bad.jsonl", "the same in every row"]),
            ("ppo_function", [{"prompt": "a"}, {"prompt": ""}], ["bad.jsonl", "row 1", "prompt"]),
            ("ratings", [{"text": "a", "ratings": [1.0, 9.0]}], ["bad.jsonl", "row 0", "9.0", "`rating_max`=4"]),
            ("ratings", [{"text": "a", "ratings": [1.0, float("nan")]}], ["bad.jsonl", "row 0", "nan"]),
            ("ratings", [{"text": "a", "ratings": []}], ["bad.jsonl", "row 0", "at least one rater"]),
            ("ratings", [{"text": "a", "ratings": "good"}], ["bad.jsonl", "row 0", "good"]),
        ],
    )
    def test_bad_rows(self, case, rows, said, folder):
        write(folder / "bad.jsonl", rows)
        limits = ("--data.rating_min=-4", "--data.rating_max=4") if case == "ratings" else ()
        self.fails(case, *said, arguments=("--data.data=bad.jsonl", *limits))

    def test_broken_json_names_the_line(self, folder):
        (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
        self.fails("sft", "bad.jsonl, line 2", arguments=("--data.data=bad.jsonl",))

    def test_unknown_strategy(self):
        self.fails("sft", "strategy='nonsense'", arguments=("--trainer.strategy=nonsense",))

    def test_minibatches_that_do_not_divide(self):
        self.fails("ppo_function", "`minibatch_size`", "4 / 3", arguments=("--model.minibatch_size=3",))

    def test_accumulation_that_does_not_divide(self):
        arguments = ("--trainer.accumulate_grad_batches=3",)
        self.fails("ppo_function", "`accumulate_grad_batches`", "2 / 3", arguments=arguments)

    def test_no_reward(self):
        self.fails("ppo_function", "`reward` is required", arguments=("--model.reward=null",))

    def test_a_reward_function_that_does_not_exist(self):
        self.fails("ppo_function", "reward=math.no_such", arguments=("--model.reward=math.no_such",))

    def test_too_many_reward_weights(self):
        self.fails("ppo_function", "`reward_weights`", arguments=("--model.reward_weights=[1, 2]",))

    @pytest.mark.parametrize("case", ["sft", "ratings", "ppo_function"])
    def test_a_model_folder_that_does_not_exist(self, case, folder):
        spec = f"{folder}/no_model"
        self.fails(case, spec, "not a model that can be loaded", arguments=(f"--model.model={spec}",))

    @pytest.mark.parametrize("case", ["sft", "ratings", "ppo_function"])
    def test_a_package_that_is_not_installed(self, case):
        spec = "package:no_such_package"
        self.fails(case, spec, "pip install", arguments=(f"--model.model={spec}",))

    def test_a_tokenizer_without_pad_and_eos(self, folder):
        (folder / "mute").mkdir()
        for file in (folder / "lm").iterdir():
            (folder / "mute" / file.name).write_bytes(file.read_bytes())
        path = folder / "mute/tokenizer_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in config.items() if k not in ("eos_token", "pad_token")}))
        self.fails("sft", "mute", "no EOS token", arguments=("--model.model=mute",))


class TestConstructorsSayWhatIsWrong:
    @pytest.mark.parametrize("module", [SFTModule, RewardModule, PPOModule])
    def test_unknown_dtype(self, module, tiny_model):
        with pytest.raises(ValueError, match=r"`dtype` must be one of .* got 'float8'"):
            module(tiny_model, dtype="float8")

    def test_minibatches_that_do_not_divide(self, tiny_model):
        with pytest.raises(ValueError, match=r"`minibatch_size` must divide `rollout_batch_size`: 5 / 2"):
            PPOModule(tiny_model, rollout_batch_size=5, minibatch_size=2)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("clip_range", 0.0), ("gamma", 1.1), ("gae_lambda", -0.1), ("temperature", 0.0), ("kl_coef", -1.0)],
    )
    def test_numbers_out_of_range(self, name, value, tiny_model):
        with pytest.raises(ValueError, match=f"`{name}`"):
            PPOModule(tiny_model, **{name: value})


def test_without_an_account_wandb_writes_to_disk_and_says_where(folder):
    # WANDB_SERVICE too: it would send the run to the service of another test, which has another working directory.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    environment = kept | {"HOME": str(folder)}
    command = [sys.executable, str(ROOT / "train.py"), "fit", *flags("ppo_function"), "--trainer.accelerator=cpu"]
    command += ["--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--trainer.default_root_dir=run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "its files are in run/wandb" in done.stdout + done.stderr
    (offline,) = Path("run/wandb").glob("offline-run-*")
    assert next(offline.glob("*.wandb")).stat().st_size > 0
    assert Path("run/metrics.csv").is_file()


def test_a_csv_needs_no_flags_but_its_name():
    Path("rows.csv").write_text("input,output\n" + "".join(f"question {i},answer {i}\n" for i in range(40)))
    arguments = ["--model=SFTModule", "--model.model=lm", "--data=SFTDataModule", "--data.data=rows.csv"]
    cli = run("fit", *arguments)
    assert cli.datamodule.sources["data"] == "rows.csv"
    assert len(cli.datamodule.rows["train"]) == 40


def test_a_checkpoint_may_be_a_reward():
    run("fit", *flags("pairs"))
    Path("run/checkpoints/last.ckpt").rename("reward.ckpt")
    cli = run("fit", *flags("ppo_function"), "--model.reward=reward.ckpt")
    assert list(cli.model.rewards.terms) == ["reward_model"]
    assert json.loads(Path("run/summary.json").read_text())["rollout/reward"] is not None


def test_a_callback_that_is_named_replaces_the_default_one():
    cli = run("fit", *flags("sft"), "--trainer.callbacks=KLAlarm", "--trainer.callbacks.threshold=7")
    assert [alarm.threshold for alarm in cli.trainer.callbacks if isinstance(alarm, KLAlarm)] == [7]
    kinds, defaults = [type(callback) for callback in cli.trainer.callbacks], [type(c) for c in default_callbacks()]
    assert [kind for kind in kinds if kind in defaults] == defaults  # in their order
    default = run("fit", *flags("sft"))
    assert [alarm.threshold for alarm in default.trainer.callbacks if isinstance(alarm, KLAlarm)] != [7]


def test_report_makes_a_page_of_a_run_and_a_comparison_of_two(capsys):
    for seed in (1, 2):
        run("fit", *flags("sft"), f"--seed_everything={seed}", f"--trainer.default_root_dir=runs/sft-{seed}")
        Path(f"runs/sft-{seed}/report.html").unlink()
    main(["report", "runs/sft-1"])
    assert "runs/sft-1/report.html" in capsys.readouterr().out
    assert "val/perplexity" in Path("runs/sft-1/report.html").read_text()
    main(["report", "runs", "--output=both.html"])
    assert "both.html" in capsys.readouterr().out
    page = Path("both.html").read_text()
    assert "sft" in page
    assert "±" in page
    with pytest.raises(ValueError, match="`folders` must be runs or hold runs, but nowhere"):
        main(["report", "nowhere"])


@pytest.mark.parametrize("flag", ["enable_progress_bar", "enable_checkpointing"])
def test_what_a_trainer_flag_turns_off_is_off(flag):
    cli = run("fit", *flags("sft"), f"--trainer.{flag}=false")
    assert (cli.trainer.progress_bar_callback is None) == (flag == "enable_progress_bar")
    assert Path("run/checkpoints").exists() == (flag != "enable_checkpointing")


def test_checkpoints_are_saved_at_the_end_of_every_epoch():
    often = ["--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=3", "--checkpoint.save_top_k=-1"]
    run("fit", *flags("sft"), *often)
    assert len(list(Path("run/checkpoints").glob("epoch=*.ckpt"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.strategy=fsdp"], "`--trainer.strategy fsdp` is not supported: for sharded weights use `fsdp2`"),
        (["--trainer.strategy=deepspeed_stage_2"], "use `fsdp2`"),
        (["--trainer.precision=16-mixed"], "16-mixed` needs a GPU; on a CPU use `bf16-mixed`"),
    ],
)
@pytest.mark.filterwarnings("ignore:You passed .*16-mixed")
def test_what_cannot_work_is_refused_with_what_can(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run("fit", *flags("sft"), *arguments)
