"""Distributed PPO with an LSTM policy: two nodes that share the work end where one process does that has it all."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EOS, make_tokenizer
from processes import free_port, node, run_together

from lightning_rlhf.modules.lstm import LSTMConfig, LSTMForCausalLM

SCRIPT = Path(__file__).with_name("two_nodes.py")


def read(folder: Path, rank: int) -> SimpleNamespace:
    """What a rank left: its samples per iteration, the last metrics, the weights."""
    found = json.loads((folder / f"{rank}.json").read_text())
    return SimpleNamespace(**found, weights=torch.load(folder / f"{rank}.pt", weights_only=True))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an LSTM with eight tokens."""
    folder = tmp_path_factory.mktemp("lstm")
    config = LSTMConfig(vocab_size=8, hidden_size=16, initializer_range=0.5, eos_token_id=EOS, pad_token_id=EOS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LSTMForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[SimpleNamespace, list[SimpleNamespace]]:
    """The same training as one process, and as two nodes."""
    alone, shared, logs = (tmp_path_factory.mktemp(name) for name in ("alone", "shared", "logs"))
    port = free_port()
    script = [str(SCRIPT), str(model)]
    run_together(
        [sys.executable, *script, str(alone)],
        *([*node(rank, port), *script, str(shared)] for rank in (0, 1)),
        log_folder=logs,
    )
    return read(alone, 0), [read(shared, rank) for rank in (0, 1)]


def test_a_process_that_fails_stops_the_others_and_all_are_shown(tmp_path):
    waits = [sys.executable, "-c", "import time; print('I wait', flush=True); time.sleep(100)"]
    fails = [sys.executable, "-c", "import time; time.sleep(2); print('I fail'); raise SystemExit(3)"]
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"(?s)code None.*I wait.*code 3.*I fail"):
        run_together(waits, fails, log_folder=tmp_path)
    assert time.monotonic() - start < 60


def test_nodes_share_out_the_prompts_and_get_the_same_responses(runs):
    alone, nodes = runs
    assert len(alone.samples) == 3
    for iteration, whole in enumerate(alone.samples):
        assert len(whole["prompt"]) == 12
        for name in ("prompt", "response"):
            assert whole[name] == nodes[0].samples[iteration][name] + nodes[1].samples[iteration][name]
        rewards = [x for one in nodes for x in one.samples[iteration]["reward"]]
        torch.testing.assert_close(torch.tensor(rewards), torch.tensor(whole["reward"]))


def test_responses_differ_between_nodes_and_iterations(runs):
    responses = [one["response"] for node in runs[1] for one in node.samples]
    assert len({str(one) for one in responses}) == 6


def test_two_nodes_end_with_the_weights_of_one_process(runs):
    alone, nodes = runs
    assert {name.partition(".")[0] for name in alone.weights} == {"policy", "value"}
    for name, weight in alone.weights.items():
        torch.testing.assert_close(nodes[0].weights[name], weight, rtol=1e-5, atol=1e-5)


def test_both_nodes_have_the_same_weights(runs):
    first, second = (node.weights for node in runs[1])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_metrics_are_those_of_all_responses(runs):
    alone, nodes = runs
    assert {"rollout/reward", "rollout/kl", "policy/approx_kl", "value/explained_variance"} <= alone.metrics.keys()
    for found in nodes:
        assert found.metrics.keys() == alone.metrics.keys()
        for name, value in alone.metrics.items():
            assert found.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_the_policy_learned(runs, model):
    alone, _ = runs
    first, last = (sum(one["reward"]) / len(one["reward"]) for one in (alone.samples[0], alone.samples[-1]))
    assert last > first + 0.5
    start = LSTMForCausalLM.from_pretrained(model).state_dict()
    for name, weight in start.items():
        assert (alone.weights[f"policy.{name}"] - weight).abs().max() > 1e-2  # a thousand times the tolerance
