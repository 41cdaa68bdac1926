"""The comparison with TRL: what both sides are given, how runs are recorded, what the table says. TRL is not run."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import versus
import versus_data
import versus_own
import versus_trl
import versus_worker
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from versus import CASES, conditions, peer_path, table
from versus_data import PROMPT_TOKENS, TINY, as_drawn, bisect, drawn_length, known_words, make_rows, prepare, tiny_model
from versus_trl import sampled_tokens
from versus_worker import Job, Record, high_water, lower_case_share, numbers

from lightning_rlhf.datamodules import SFTDataModule
from lightning_rlhf.modules import GRPOModule, PPOModule, PreferenceModule, RewardModule, SFTModule
from lightning_rlhf.modules.sharing import shared_base

FLAGS = dict(tiny=True, model="", iterations=3, accelerator="cpu", threads=2, compiled=False, own_only=False)


def make_job(**changes: object) -> Job:
    fields = dict(case="sft", side="own", method="sft", policy="p", reward="r", data="d", rows=4, learning_rate=1e-5)
    return Job(**(fields | dict(warmup=1, iterations=2, accelerator="cpu", threads=1) | changes))


def make_result(case: str, side: str, median: float, gib: float, **changes: object) -> dict:
    found = dict(job={"case": case, "side": side, "threads": 2, "accelerator": "cpu"}, median=median, gib=gib)
    return found | dict(tokens=[100, 101], steps=[4, 4], cpu="A Chip", versions={"torch": "2.13.0"}) | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("versus")


class TestCommand:
    @pytest.fixture(scope="class")
    def results(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("results")

    def call(self, monkeypatch: pytest.MonkeyPatch, results: Path, *flags: str) -> None:
        own = ["sft", "--tiny", "--own-only", "--repeats", "1", "--threads", "1", "--results", str(results)]
        monkeypatch.setattr(sys, "argv", ["versus.py", *own, *flags])
        versus.main()

    def test_measures_and_writes_a_file_and_a_table(self, results, monkeypatch, capsys):
        self.call(monkeypatch, results, "--iterations", "1")
        found = json.loads((results / "sft-own-0.json").read_text())
        assert found["job"]["iterations"] == len(found["seconds"]) == 2
        assert len(found["warmup_seconds"]) == 1
        assert found["median"] == statistics.median(found["seconds"]) > 0
        assert found["steps"] == [1, 1]
        rows = [json.loads(line) for line in Path(found["job"]["data"]).read_text().splitlines()]
        assert len(rows) == 48
        whole = sum(len(row["text"].split()) + 1 for row in rows)  # each with its EOS
        assert whole - 16 * 161 <= sum(found["tokens"]) <= whole - 16 * 21  # without the 16 of the warm-up
        assert 0.1 < found["gib"] < 8
        assert 4 < found["figures"]["train/loss"] < 7  # ln 217 = 5.38, for it knows nothing yet
        assert {"python", "lightning", "lightning-rlhf", "torch", "transformers"} <= found["versions"].keys()
        written = (results / "table.md").read_text()
        assert written in capsys.readouterr().out
        assert "| sft | " in written

    def test_does_not_repeat_what_is_done(self, results, monkeypatch):
        before = (results / "sft-own-0.json").read_text()
        monkeypatch.setattr(versus.subprocess, "run", None)  # a call would fail
        self.call(monkeypatch, results, "--iterations", "1")
        assert (results / "sft-own-0.json").read_text() == before

    def test_takes_no_run_of_other_settings_for_its_own(self, results, monkeypatch):
        with pytest.raises(SystemExit, match=r"sft-own-0\.json is of a run with another data, iterations;"):
            self.call(monkeypatch, results, "--iterations", "2")

    def test_says_what_a_failed_worker_said(self, tmp_path, monkeypatch):
        (tmp_path / "versus_own.py").write_text("print('out of luck'); raise SystemExit(3)")
        monkeypatch.setattr(versus, "HERE", tmp_path)
        with pytest.raises(SystemExit, match=r"(?s)versus_own\.py.*failed with code 3:\nout of luck"):
            versus.run(make_job(), 0, tmp_path, tmp_path)
        assert not (tmp_path / "sft-own-0.json").exists()


class TestTable:
    def test_has_medians_extremes_and_ratios(self):
        seconds, gib = {"own": [2.0, 1.0, 4.0], "trl-1.16.0": [6.0, 5.0, 9.0]}, {"own": 3.0, "trl-1.16.0": 4.5}
        results = [make_result("dpo", side, s, gib[side]) for side in seconds for s in seconds[side]]
        header, rule, line, *_ = table(results)
        assert header.count("|") == rule.count("|") == line.count("|")
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[:4] == ["dpo", "2.00 (1.00 to 4.00)", "6.00 (5.00 to 9.00)", "3.00"]
        assert cells[4:7] == ["3.00 (3.00 to 3.00)", "4.50 (4.50 to 4.50)", "1.50"]
        assert cells[7:] == ["100 / 100", "4 / 4"]

    def test_shows_where_the_sides_did_not_do_as_much(self):
        results = [make_result("ppo", "own", 1, 1, steps=[16]), make_result("ppo", "trl-1.8.0", 1, 1, steps=[4])]
        assert list(table(results))[2].endswith("| 16 / 4 |")

    def test_leaves_the_peers_cells_empty_without_one(self):
        line = list(table([make_result("sft", "own", 1.5, 1.0)]))[2]
        assert line == "| sft | 1.50 (1.50 to 1.50) |  |  | 1.00 (1.00 to 1.00) |  |  | 100 | 4 |"

    def test_has_a_line_for_each_case_in_order_and_names_the_machine_once(self):
        lines = list(table([make_result(case, "own", 1, 1) for case in ("sft", "ppo", "sft")]))
        assert [line.split("|")[1].strip() for line in lines[2:4]] == ["sft", "ppo"]
        assert lines[4:] == ["", "own: A Chip, cpu, OMP_NUM_THREADS=2; torch 2.13.0."]

    def test_conditions_of_another_machine_differ(self):
        results = [make_result("sft", "own", 1, 1), make_result("sft", "own", 1, 1, cpu="Another")]
        assert len(set(map(conditions, results))) == 2


class TestSameReward:
    def result(self, side: str, rewards: list[float], seconds: list[float]) -> dict:
        return make_result(
            "grpo_learning", side, 1, 1, rewards=rewards, warmup_seconds=seconds[:1], seconds=seconds[1:]
        )

    def test_is_the_lower_of_both_ends_and_when_each_got_there(self):
        own = self.result("own", [0.0, 0.3, 0.6, 0.9, 0.9], [4.0, 2.0, 2.0, 2.0, 2.0])  # smoothed 0.3, 0.6, 0.8
        peer = self.result("trl-1.16.0", [0.2, 0.2, 0.5, 0.5, 0.8], [9.0, 5.0, 5.0, 5.0, 5.0])  # 0.3, 0.4, 0.6
        line = list(versus.same_reward([own, peer]))[-1]
        assert line == "| grpo_learning | 0.100 | 0.600 | 10 | 29 | 2.90 |"
        assert line in list(table([own, peer]))

    def test_needs_both(self):
        assert list(versus.same_reward([self.result("own", [0.0] * 3, [1.0] * 3)])) == []

    def test_other_cases_have_none(self):
        assert not any("reached" in line for line in table([make_result("ppo", side, 1, 1) for side in ("own", "t")]))


class TestOthers:
    def jobs(self, folder: Path, name: str, **changes: object) -> dict[str, Job]:
        return versus.jobs(name, argparse.Namespace(**FLAGS | {"results": folder, "iterations": 1} | changes))

    def test_memory_of_lora_is_of_as_many_tokens(self, folder):
        ppo, sft = (self.jobs(folder, name)["own"] for name in ("ppo_lora", "sft_lora"))
        assert self.jobs(folder, "ppo_lora").keys() == {"own"}
        assert (ppo.lora_r, sft.lora_r) == (16, 16)
        texts = [json.loads(line)["text"].split() for line in Path(sft.data).read_text().splitlines()]
        assert {len(text) + 1 for text in texts} == {PROMPT_TOKENS + ppo.max_new_tokens}  # each with its EOS
        assert ppo.minibatch == sft.rows

    def test_the_reward_model_is_an_adapter_of_the_policys_base(self, folder):
        module = versus_own.make_module(self.jobs(folder, "ppo_lora")["own"])
        module.configure_model()
        (term,) = module.rewards.to(torch.device("cpu"), None, shared_base(module)).terms.values()
        policy = {p.data_ptr() for p in module.policy.parameters()}
        own = [p for p in term._scorer.parameters() if p.data_ptr() not in policy]
        assert 0 < sum(p.numel() for p in own) < 0.5 * sum(p.numel() for p in module.policy.parameters())

    def test_compiled_is_what_is_ours(self, folder):
        own, peer = self.jobs(folder, "ppo", compiled=True).values()
        assert (own.compiled, peer.compiled) == (True, False)
        h = versus_own.make_module(own).hparams
        assert (h.compiled_layers, h.compiled_rollouts) == (True, True)
        h = versus_own.make_module(self.jobs(folder, "dpo", compiled=True)["own"]).hparams
        assert h.compiled_layers

    def test_learning_is_watched(self, folder):
        record = Record()
        for rewards in ([0.0, 1.0], [0.5]):
            record.reward(rewards)
        record.lap()
        record.lap()
        assert [lap["reward"] for lap in record.laps] == [0.5, 0.0]
        own, peer = self.jobs(folder, "grpo_learning").values()
        assert own.steps == peer.steps == 2


def test_what_this_project_sets_is_not_set_for_a_peer():
    script = (
        "import os, versus, versus_data; "
        "print(*('THP_MEM_ALLOC_ENABLE' in known for known in (os.environ, versus.INHERITED)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", script]
    folder = Path(versus.__file__).parent
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True, text=True)
    assert done.stdout.split() == ["True", "False"]


class TestJobs:
    @pytest.fixture(scope="class")
    def jobs(self, folder) -> dict[str, dict[str, Job]]:
        names = [name for name, case in CASES.items() if case.data != "ends"]  # their model takes seconds to make
        return {name: versus.jobs(name, argparse.Namespace(**FLAGS, results=folder)) for name in names}

    def test_both_sides_do_the_same(self, jobs):
        for own, peer in (both.values() for both in jobs.values()):
            differing = {key for key, value in asdict(own).items() if asdict(peer)[key] != value}
            assert differing <= {"side", "data"}

    def test_the_peer_of_ppo_is_the_release_that_has_it(self, jobs):
        releases = {name: list(both)[1] for name, both in jobs.items()}
        assert {name for name, release in releases.items() if release == "trl-1.8.0"} == {"ppo", "ppo_value_network"}
        assert set(releases.values()) == {"trl-1.8.0", "trl-1.16.0"}

    def test_iterations_are_as_the_docstring_says(self, jobs):
        steps = {name: both["own"].steps for name, both in jobs.items()}
        assert steps == {"ppo": 16, "ppo_value_network": 16, "grpo": 16, "dpo": 1, "reward": 1, "sft": 1}
        assert {name: both["own"].total for name, both in jobs.items() if both["own"].iterations == 3}.keys() == {
            "ppo",
            "ppo_value_network",
            "grpo",
        }
        assert jobs["dpo"]["own"].total == 7

    def test_there_are_rows_for_every_iteration(self, jobs):
        rows = {name: len(Path(both["own"].data).read_text().splitlines()) for name, both in jobs.items()}
        assert rows == {"ppo": 256, "ppo_value_network": 256, "grpo": 32, "dpo": 112, "reward": 112, "sft": 112}

    def test_the_modules_have_the_settings(self, jobs):
        modules = {name: versus_own.make_module(both["own"]) for name, both in jobs.items()}
        classes = [PPOModule, PPOModule, GRPOModule, PreferenceModule, RewardModule, SFTModule]
        assert [type(module) for module in modules.values()] == classes
        for name in ("ppo", "ppo_value_network", "grpo"):
            h = modules[name].hparams
            assert h.num_passes * h.rollout_batch_size // h.minibatch_size == 16
            assert (h.min_new_tokens, h.max_new_tokens) == (24, 24)
        assert modules["ppo"].hparams.value_model is None
        assert modules["ppo_value_network"].hparams.value_model == jobs["ppo"]["own"].reward
        assert (modules["ppo"].kl_coef, modules["grpo"].kl_coef) == (0.05, 0.04)
        assert (modules["grpo"].hparams.group_size, modules["grpo"].hparams.kl_in) == (8, "loss")
        assert modules["dpo"].objective.beta == 0.1
        assert {module.hparams.dtype for module in modules.values()} == {"bfloat16"}
        assert not any(module.hparams.compiled_layers for module in modules.values())

    @pytest.mark.parametrize("name", ["ppo_uneven", "grpo_uneven"])
    def test_uneven_responses_may_end_early(self, name):
        settings = CASES[name].settings
        assert "min_new_tokens" not in settings
        assert settings["passes"] * CASES[name].rows // settings["minibatch"] == 16
        assert CASES[name].rows == CASES[name].prompts * settings.get("group_size", 1)


class TestPeers:
    def test_what_is_there_is_not_installed(self, tmp_path, monkeypatch):
        for name in ("trl-1.8.0", "shared"):
            (tmp_path / name).mkdir()
        monkeypatch.setattr(versus.subprocess, "run", None)
        monkeypatch.setitem(versus.INHERITED, "PYTHONPATH", "mine")
        assert peer_path(tmp_path, "trl-1.8.0").split(os.pathsep) == [
            str(tmp_path / "trl-1.8.0"),
            str(tmp_path / "shared"),
            "mine",
        ]

    def test_what_is_missing_is_installed_without_its_dependencies(self, tmp_path, monkeypatch):
        commands = []

        def run(command: list[str], check: bool) -> None:
            commands.append(command)
            Path(command[command.index("--target") + 1]).mkdir()

        (tmp_path / "shared").mkdir()
        monkeypatch.setattr(versus.subprocess, "run", run)
        monkeypatch.delitem(versus.INHERITED, "PYTHONPATH", raising=False)
        path = peer_path(tmp_path, "trl-1.16.0")
        assert [command[-1] for command in commands] == ["trl==1.16.0"]
        assert "--no-deps" in commands[0]
        assert (tmp_path / "trl-1.16.0").is_dir()
        assert path.split(os.pathsep) == [str(tmp_path / "trl-1.16.0"), str(tmp_path / "shared")]


class TestRecord:
    def test_laps_go_from_end_to_end_and_count_tokens_and_steps(self, monkeypatch):
        clock = iter([10.0, 11.0, 14.0, 20.0])
        monkeypatch.setattr(versus_worker.time, "perf_counter", lambda: next(clock))
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        record = Record()
        record.start()
        for steps, tokens in ((1, 5), (3, 6), (2, 7)):
            for _ in range(steps):
                weight.grad = torch.ones(1)
                optimizer.step()
            record.count(torch.tensor(tokens))
            record.count(1)
            record.lap()
        result = record.result(make_job(), (), {"loss": 1.0})
        assert result["warmup_seconds"] == [1.0]
        assert (result["seconds"], result["median"]) == ([3.0, 6.0], 4.5)
        assert (result["tokens"], result["steps"]) == ([7, 8], [3, 2])
        assert result["job"] == asdict(make_job())
        optimizer.step()
        assert record._steps == 0  # no longer listening

    def test_a_run_that_ended_early_is_no_result(self):
        record = Record()
        record.start()
        record.lap()
        with pytest.raises(RuntimeError, match="3 iterations were asked for, 1 were done"):
            record.result(make_job(), (), {})

    def test_high_water_is_the_most_that_was_resident(self):
        status = "Name:\tpython\nVmPeak:\t 9999999 kB\nVmHWM:\t 1572864 kB\nVmRSS:\t  100 kB\n"
        assert high_water(status) == 1.5

    def test_this_process_has_a_peak(self):
        assert 0.05 < versus_worker.peak_gib() < 64

    def test_the_grpo_reward_is_a_share(self):
        assert lower_case_share(["abc", "a C!", ""]) == [1.0, 0.25, 0.0]

    def test_only_single_numbers_are_figures(self):
        given = {"loss": torch.tensor(2.0), "step": 3, "text": "x", "many": torch.zeros(2)}
        assert numbers(given) == {"loss": 2.0, "step": 3.0}


class TestPeerTokens:
    def test_are_counted_up_to_the_first_eos(self):
        responses = torch.tensor([[5, 0, 7, 0], [5, 6, 7, 8], [0, 1, 1, 1]])
        assert sampled_tokens(responses, eos=0) == 2 + 4 + 1

    def test_are_all_where_none_ends(self):
        assert sampled_tokens(torch.zeros(3, 4, dtype=torch.long), eos=None) == 12

    def test_the_trainers_batches_are_counted_without_padding(self):
        class Trainer:
            def training_step(self, model, inputs, *args):
                return inputs["value"], args

        record, trainer = Record(), Trainer()
        counted = versus_trl.counting(trainer, record)
        inputs = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]), "value": 9}
        assert counted.training_step(None, inputs, 3) == (9, (3,))
        assert record._tokens == 5
        record._hook.remove()


class TestData:
    @pytest.fixture(scope="class")
    def tokenizer(self):
        return tiny_model()[1]

    def test_words_are_one_token_each(self, tokenizer):
        words = known_words(tokenizer)
        assert len(words) == len(set(words)) > 200
        for row in make_rows("pairs", tokenizer, 20):
            for name in ("chosen", "rejected"):
                text = row["prompt"] + row[name]
                assert len(tokenizer(text)["input_ids"]) == len(text.split()) == 8 + len(row[name].split())
                assert row[name].startswith(" ")

    def test_a_tokenizer_that_splits_common_words_is_refused(self, tokenizer, monkeypatch):
        monkeypatch.setattr(versus_data, "WORDS", ["the", "of", "strangeword"])
        monkeypatch.setattr(tokenizer, "encode", lambda text, **_: [1] if text.strip() == "the" else [1, 2])
        with pytest.raises(ValueError, match=r"`--model`: its tokenizer must have 50 common words .* but it has 1"):
            known_words(tokenizer)

    def test_lengths_are_log_normal_between_their_limits(self):
        rng = versus_data.random.Random(5)
        lengths = [drawn_length(rng, 20, 120) for _ in range(4000)]
        assert (min(lengths), max(lengths)) == (20, 120)
        # The median is √(20 · 120) = 49; beyond each limit, two standard deviations off, lie 2.3% of a normal.
        assert 47 <= statistics.median(lengths) <= 51
        assert 0.01 < lengths.count(20) / 4000 < 0.04
        assert 0.01 < lengths.count(120) / 4000 < 0.04

    def test_rows_are_the_same_at_every_call(self, tokenizer):
        assert list(make_rows("texts", tokenizer, 5)) == list(make_rows("texts", tokenizer, 9))[:5]

    def test_the_peer_gets_this_librarys_batches(self, tokenizer, tmp_path):
        path = tmp_path / "texts.jsonl"
        versus_data.write_rows(path, make_rows("texts", tokenizer, 48))
        data = SFTDataModule(str(path), tokenizer=tokenizer, batch_size=16)
        data.prepare_data()
        data.setup("fit")
        ours = [sorted(batch["attention_mask"].sum(1).tolist()) for batch in data.train_dataloader()]
        lengths = [len(row["text"].split()) + 1 for row in as_drawn(path, 16)]
        assert ours == [sorted(lengths[start : start + 16]) for start in (0, 16, 32)]

    def test_bisection_finds_the_point(self):
        assert bisect(lambda x: 100 - x * x, 0, 10, target=51, tolerance=0.01) == pytest.approx(7, abs=0.001)

    def test_bisection_says_when_there_is_none(self):
        with pytest.raises(ValueError, match=r"no point found where the function is 5 ± 1; at .* it is 9"):
            bisect(lambda x: 9, 0, 10, target=5, tolerance=1)


class TestModels:
    @pytest.fixture(scope="class")
    def paths(self, folder) -> dict[str, str]:
        return prepare(folder / "models", TINY, "ends", 16, 8)

    def test_weights_are_bfloat16_and_padding_is_not_eos(self, paths):
        policy = AutoModelForCausalLM.from_pretrained(Path(paths["policy"]).with_name("policy"), dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(paths["policy"])
        assert policy.dtype == torch.bfloat16
        assert (policy.config.num_hidden_layers, policy.config.hidden_size) == (2, 64)
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id, policy.config.pad_token_id) == (0, 1, 1)

    def test_the_reward_model_has_the_policys_weights_and_a_head(self, paths):
        reward = AutoModelForSequenceClassification.from_pretrained(paths["reward"], dtype="auto")
        policy = AutoModelForCausalLM.from_pretrained(Path(paths["policy"]).with_name("policy"), dtype="auto")
        for name, tensor in policy.model.state_dict().items():
            assert torch.equal(tensor, reward.model.state_dict()[name])
        assert reward.score.weight.shape == (1, 64)
        assert reward.score.weight.abs().sum() > 0

    def test_only_the_eos_row_differs_in_the_model_that_ends(self, paths):
        folders = Path(paths["policy"]).with_name("policy"), paths["policy"]
        before, after = (AutoModelForCausalLM.from_pretrained(f, dtype="auto").state_dict() for f in folders)
        different = {name for name in before if not torch.equal(before[name], after[name])}
        assert different == {"model.embed_tokens.weight", "lm_head.weight"}  # tied: one tensor
        rows = (before["lm_head.weight"] != after["lm_head.weight"]).any(1).nonzero().flatten()
        assert rows.tolist() == [0]

    def test_its_responses_have_the_mean_length_and_a_tail(self, paths):
        model = AutoModelForCausalLM.from_pretrained(paths["policy"], dtype="auto")
        prompts = torch.randint(2, 217, (200, 8))
        options = dict(do_sample=True, max_new_tokens=128, top_k=0, attention_mask=torch.ones_like(prompts))
        sampled = model.generate(prompts, **options)[:, 8:]
        lengths = (sampled != 1).sum(1).float()  # what follows EOS is padding
        # Geometric, cut at 128: the standard deviation is about the mean, of 200 it is 25 / √200 = 1.8, of the 256 that
        # the model was fitted to 1.6, and the fit is within 2.5.
        assert 17 < lengths.mean() < 33
        assert lengths.median() < lengths.mean()
        assert lengths.max() > 60

    def test_nothing_is_made_twice(self, folder, paths, monkeypatch):
        for name in ("write_policy", "write_reward", "write_ending", "write_rows"):
            monkeypatch.setattr(versus_data, name, None)
        assert prepare(folder / "models", TINY, "ends", 16, 8) == paths

    def test_what_was_written_in_part_is_written_again(self, tmp_path):
        (tmp_path / "model.partial").mkdir()
        (tmp_path / "model.partial" / "half").touch()
        made = versus_data.once(tmp_path / "model", lambda path: path.mkdir())
        assert list(made.iterdir()) == []
