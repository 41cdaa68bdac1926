"""The arithmetic experiment: what is asked, what is held out, what chance is, and what the table says. No training."""

import json
from pathlib import Path

import arithmetic
import pytest
import torch
import yaml
from arithmetic import chance, is_held_out, make_model, make_tokenizer, prepare, problems, splits, table
from transformers import AutoModelForCausalLM

from lightning_rlhf.datamodules.text import encode_completion
from lightning_rlhf.pretrained import load_tokenizer
from lightning_rlhf.rewards import ExactMatch

CONFIGS = Path(__file__).parents[2] / "configs" / "arithmetic"


def digits(row: dict[str, str]) -> list[int]:
    """Of a prompt `a+b+c+d=`."""
    assert row["prompt"][1::2] == "+++="
    return [int(character) for character in row["prompt"][::2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic")
    prepare(folder)
    return folder


class TestData:
    def test_has_every_sum_of_four_digits_once(self):
        prompts = [row["prompt"] for row in problems()]
        assert (prompts[0], prompts[1234], prompts[-1]) == ("0+0+0+0=", "1+2+3+4=", "9+9+9+9=")
        assert len(prompts) == len(set(prompts)) == 10_000

    def test_answers_are_right(self):
        for row in problems():
            a, b, c, d = digits(row)
            assert row["completion"] == row["answer"] == str(a + b + c + d)

    def test_every_problem_is_for_training_or_held_out(self):
        parts = splits()
        both = [row["prompt"] for name in ("train", "held_out") for row in parts[name]]
        assert sorted(both) == [row["prompt"] for row in problems()]
        assert 1000 <= len(parts["held_out"]) <= 1500

    def test_no_held_out_problem_is_in_training_even_with_its_digits_moved(self):
        parts = splits()
        held_out = {tuple(sorted(digits(row))) for row in parts["held_out"]}
        for name in ("sft", "train"):
            assert not held_out & {tuple(sorted(digits(row))) for row in parts[name]}

    def test_the_order_of_digits_does_not_matter_to_the_split(self):
        sides = {is_held_out({"prompt": f"{a}+{b}+7+1="}) for a, b in ((2, 3), (3, 2))}
        assert len(sides) == 1

    def test_sft_learns_from_a_part_of_the_training_problems_none_twice(self):
        parts = splits()
        shown = {row["prompt"] for row in parts["sft"]}
        assert len(parts["sft"]) == len(shown) == 2000
        assert shown < {row["prompt"] for row in parts["train"]}

    def test_files_hold_the_splits_and_are_the_same_at_every_call(self, folder, tmp_path):
        prepare(tmp_path)
        for name, rows in splits().items():
            text = (folder / "data" / f"{name}.jsonl").read_text()
            assert [json.loads(line) for line in text.splitlines()] == rows
            assert (tmp_path / "data" / f"{name}.jsonl").read_text() == text

    def test_the_reward_of_the_configs_accepts_right_answers_only(self):
        rows = splits()["held_out"][:50]
        prompts, answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]
        reward = ExactMatch(column="answer")
        assert reward(prompts, answers, answer=answers) == [1.0] * 50
        assert reward(prompts, [str(int(answer) + 1) for answer in answers], answer=answers) == [0.0] * 50


def test_chance_by_hand():
    training = [{"answer": answer} for answer in ("3", "3", "3", "4", "5")]
    held_out = [{"answer": answer} for answer in ("3", "4", "4", "6")]
    # A guess is 3 in 3/5 of all cases, right in 1/4; 4 in 1/5, right in 2/4; 5 and 6 never meet: 3/20 + 2/20.
    # Always 3 is right in 1/4.
    assert chance(training, held_out) == pytest.approx({"guess": 0.25, "constant": 0.25})
    assert chance(held_out, training) == pytest.approx({"guess": 0.25, "constant": 0.2})


class TestTokenizer:
    def test_has_a_token_for_each_character(self, folder):
        tokenizer = load_tokenizer(str(folder / "start"))
        assert len(tokenizer) == 13
        assert tokenizer("9+0=")["input_ids"] == [10, 11, 1, 12]
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0

    def test_gives_every_text_back(self, folder):
        tokenizer = load_tokenizer(str(folder / "start"))
        for row in problems()[::37]:
            text = row["prompt"] + row["completion"]
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text)
            assert tokenizer.decode(ids) == text

    def test_what_is_learned_is_the_answer_and_its_end(self):
        ids, targets = encode_completion(make_tokenizer(), "9+8+0+0=", "17", max_length=None, append_eos=True)
        assert [i for i, target in zip(ids, targets, strict=True) if target] == [2, 8, 0]


class TestModel:
    def test_loads_and_gives_logits_for_the_tokenizer(self, folder):
        model = AutoModelForCausalLM.from_pretrained(folder / "start")
        ids = torch.tensor([load_tokenizer(str(folder / "start"))("1+2+3+4=")["input_ids"]])
        assert model(ids).logits.shape == (1, 8, 13)
        # Embedding and head 2 · 13 · 64; a block: attention 4 · 64², MLP 3 · 64 · 256, norms 2 · 64; last norm 64.
        assert model.num_parameters() == 2 * 13 * 64 + 2 * (4 * 64**2 + 3 * 64 * 256 + 2 * 64) + 64

    def test_is_the_same_at_every_call_and_leaves_the_noise_alone(self, folder):
        torch.manual_seed(1)
        expected = torch.rand(1)
        torch.manual_seed(1)
        model = make_model()
        assert torch.equal(torch.rand(1), expected)
        saved = AutoModelForCausalLM.from_pretrained(folder / "start").state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(saved[name], value), name


class TestConfigs:
    @pytest.fixture(scope="class")
    def configs(self) -> dict[str, dict]:
        return {name: yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("sft", "grpo", "ppo")}

    def test_read_what_is_prepared_and_what_the_stage_before_writes(self, configs, folder):
        sft = configs["sft"]
        root = sft["model"]["init_args"]["model"].removesuffix("/start")
        for config in configs.values():
            for flag in ("data", "val_data"):
                assert (folder / config["data"]["init_args"][flag].removeprefix(root + "/")).is_file()
        assert (folder / "start" / "config.json").is_file()
        for name in ("grpo", "ppo"):
            assert configs[name]["model"]["init_args"]["model"] == sft["trainer"]["default_root_dir"] + "/model"

    def test_all_are_judged_on_held_out_problems_and_trained_on_others(self, configs):
        for config in configs.values():
            files = config["data"]["init_args"]
            assert files["val_data"].endswith("/held_out.jsonl")
            assert files["data"].endswith(("/train.jsonl", "/sft.jsonl"))

    def test_the_checker_is_the_only_reward(self, configs):
        expected = [{"class_path": "lightning_rlhf.rewards.ExactMatch", "init_args": {"column": "answer"}}]
        for name in ("grpo", "ppo"):
            assert configs[name]["model"]["init_args"]["reward"] == expected

    def test_an_answer_and_its_end_fit(self, configs):
        longest = max(len(row["answer"]) for row in problems()) + 1
        for name in ("grpo", "ppo"):
            assert configs[name]["model"]["init_args"]["max_new_tokens"] >= longest


class TestRun:
    @pytest.fixture
    def commands(self, monkeypatch) -> list[dict[str, str]]:
        """Command lines instead of processes; each validation finds its own temperature as accuracy."""
        seen = []

        def train(command: str, *flags: str) -> tuple[float, float]:
            said = dict(zip(flags[::2], flags[1::2], strict=True))
            seen.append({"": command} | said)
            if command == "validate":
                folder = Path(said["--trainer.default_root_dir"]) / "validate"
                folder.mkdir(parents=True)
                (folder / "metrics.csv").write_text(f"epoch,val/reward\n0,{said['--model.temperature']}\n")
            return 3.0, 0.5

        monkeypatch.setattr(arithmetic, "train", train)
        return seen

    def test_trains_from_the_sft_model_and_judges_at_both_temperatures(self, commands, tmp_path):
        (tmp_path / "ppo-7").mkdir()
        arithmetic.run("ppo", 7, tmp_path)
        fit, *judged = commands
        assert (fit[""], fit["--config"], fit["--seed_everything"]) == ("fit", "configs/arithmetic/ppo.yaml", "7")
        assert fit["--model.model"] == str(tmp_path / "sft" / "model")
        assert fit["--data.data"] == str(tmp_path / "data" / "train.jsonl")
        for command in judged:
            assert command["--model.model"] == str(tmp_path / "ppo-7" / "model")
            assert command["--data.val_data"] == str(tmp_path / "data" / "held_out.jsonl")
        result = json.loads((tmp_path / "ppo-7" / "result.json").read_text())
        assert result == dict(name="ppo", seed=7, seconds=3.0, gib=0.5, sampled=1.0, near_greedy=0.05)

    def test_what_is_done_is_not_repeated(self, commands, tmp_path):
        (tmp_path / "sft").mkdir()
        arithmetic.run("sft", 1, tmp_path)
        assert [command[""] for command in commands] == ["fit", "validate", "validate"]
        arithmetic.run("sft", 1, tmp_path)
        assert len(commands) == 3

    def test_what_is_trained_but_not_judged_is_only_judged(self, commands, tmp_path):
        (tmp_path / "grpo-2").mkdir()
        trained = dict(name="grpo", seed=2, seconds=70.0, gib=0.6)
        (tmp_path / "grpo-2" / "trained.json").write_text(json.dumps(trained))
        arithmetic.run("grpo", 2, tmp_path)
        assert [command[""] for command in commands] == ["validate", "validate"]
        result = json.loads((tmp_path / "grpo-2" / "result.json").read_text())
        assert result == trained | dict(sampled=1.0, near_greedy=0.05)


def test_the_table_by_hand():
    def one(name: str, seed: int, sampled: float, near_greedy: float, seconds: float) -> dict:
        return dict(name=name, seed=seed, sampled=sampled, near_greedy=near_greedy, seconds=seconds)

    runs = [
        one("sft", 1, 0.1, 0.2, 9.6),
        one("grpo", 1, 0.4, 0.5, 60.0),
        one("ppo", 1, 0.7, 0.9, 20.0),
        one("grpo", 2, 0.6, 0.3, 80.0),
        one("grpo", 3, 0.8, 0.7, 100.0),
    ]
    results = {"chance": {"guess": 0.05, "constant": 0.0666}, "runs": runs}
    # GRPO: 40, 60, 80 are 60 ± 20, 30 above the start at least; 50, 30, 70 are 50 ± 20, at least 10 above 20.
    assert list(table(results))[2:] == [
        "| chance: a guess | 5.0 | | | |",
        "| chance: always the commonest answer | 6.7 | | | |",
        "| SFT (the start) | 10.0 | 20.0 | | 10 |",
        "| GRPO | 60.0 ± 20.0 | 50.0 ± 20.0 | +30.0; near-greedy +10.0 | 80 |",
        "| PPO | 70.0 | 90.0 | +60.0; near-greedy +70.0 | 20 |",
    ]
