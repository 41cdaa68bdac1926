"""Rollouts by an engine: by a stand-in for vLLM with weights of its own, and by vLLM itself where it is installed."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from conftest import make_llama, make_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_rlhf.modules import GRPOModule, PPOModule, RFTModule, TextModule, engines
from lightning_rlhf.modules.backbone import add_lora
from lightning_rlhf.modules.engines import VLLMEngine, as_rollout, whole_weights
from lightning_rlhf.modules.rollout import Sampling
from lightning_rlhf.modules.scorer import merged
from lightning_rlhf.train import main


class StandIn:
    """As much of vllm.LLM as is used: no weights at first, no cache, one prompt after the other."""

    made: ClassVar[list["StandIn"]]

    def __init__(self, model: str, load_format: str, dtype: str, **options: object) -> None:
        self.options, self.resets, self.seeds, self.loads = options, 0, [], True
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=getattr(torch, dtype))
        assert load_format == "dummy"
        nn.init.zeros_(self.model.get_output_embeddings().weight)
        self.made.append(self)

    def collective_rpc(self, method, kwargs) -> None:
        assert method == "reload_weights"
        own, given = dict(self.model.named_parameters()), dict(kwargs["weights_iterator"])
        assert given.keys() == own.keys()
        for name, weight in given.items() if self.loads else ():
            own[name].data.copy_(weight)

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    @torch.no_grad()
    def generate(self, prompts, params, use_tqdm):
        return [self.answer(prompt["prompt_token_ids"], p) for prompt, p in zip(prompts, params, strict=True)]

    def answer(self, ids, params):
        self.seeds.append(params.seed)
        generator, found, logprobs = torch.Generator().manual_seed(params.seed), [], []
        while len(found) < params.max_tokens and not (found and found[-1] in params.stop_token_ids):
            logits = self.model(torch.tensor([ids + found])).logits[0, -1].float() / params.temperature
            if len(found) < params.min_tokens:
                logits[params.stop_token_ids] = -torch.inf
            found.append(int(logits.softmax(-1).multinomial(1, generator=generator)))
            logprobs.append({found[-1]: SimpleNamespace(logprob=logits.log_softmax(-1)[found[-1]].item())})
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(found), logprobs=logprobs)])


@pytest.fixture
def stand_in(monkeypatch) -> type[StandIn]:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = StandIn, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(StandIn, "made", [], raising=False)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return StandIn


def figures(module) -> dict[str, float]:
    return {name: float(value) for name, value in module.trainer.callback_metrics.items()}


METHODS = {
    "ppo": (PPOModule, {}),
    "ppo with lora": (PPOModule, {"lora_r": 4}),
    "ppo with a minimum length": (PPOModule, {"min_new_tokens": 2, "temperature": 0.7}),
    "grpo": (GRPOModule, {"group_size": 3}),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_engine_samples_from_the_weights_of_the_moment(short, fit, stand_in, name):
    kind, options = METHODS[name]
    engine = VLLMEngine(max_model_len=32, options={"enforce_eager": True})
    module = fit(short(kind)(rollout_engine=engine, **options), max_epochs=3)
    (made,) = stand_in.made
    assert made.options["max_model_len"] == 32
    assert made.options["enforce_eager"]
    assert made.options["gpu_memory_utilization"] == 0.3
    assert made.resets == 3
    assert figures(module)["rollout/sampler_gap_max"] < 1e-5
    assert len(set(made.seeds)) == 3 * 6  # each response of each iteration has its own


def test_weights_that_do_not_arrive_are_seen(short, fit, stand_in, monkeypatch):
    def once(self, method, kwargs):
        load(self, method, kwargs)
        self.loads = False

    load = StandIn.collective_rpc
    monkeypatch.setattr(StandIn, "collective_rpc", once)
    module = fit(short(PPOModule)(rollout_engine=VLLMEngine(), learning_rate=0.1), max_epochs=3)
    assert figures(module)["rollout/sampler_gap"] > 0.1


def test_the_same_run_twice(short, fit, stand_in):
    runs = [fit(short(PPOModule)(rollout_engine=VLLMEngine()), max_epochs=2).samples for _ in range(2)]
    assert runs[0]["response"] == runs[1]["response"]
    assert len(set(runs[0]["response"])) > 2


def test_the_reference_answers_by_the_engine_too(short, fit, stand_in):
    """Rejection sampling from the reference, the adapter switched off: those log-probabilities are the reference's."""
    options = {"group_size": 3, "minibatch_size": 1, "from_reference": True, "lora_r": 4, "learning_rate": 0.5}
    module = fit(short(RFTModule)(rollout_engine=VLLMEngine(), **options), max_epochs=3)
    assert figures(module)["rollout/sampler_gap"] > 1e-3  # the policy has moved
    (made,) = stand_in.made
    start = dict(made.model.named_parameters())
    with module.reference() as reference:
        for name, weight in whole_weights(reference):
            torch.testing.assert_close(start[name], weight)


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = add_lora(make_llama(vocab_size=8, mlp_bias=True), 2, 4, "all-linear", last_layers=1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model


def test_whole_weights_are_those_of_the_merged_model():
    model = adapted()
    expected, found = dict(merged(model).named_parameters()), dict(whole_weights(model))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.detach())
    with model.disable_adapter():
        off = dict(whole_weights(model))
    start = dict(make_llama(vocab_size=8, mlp_bias=True).named_parameters())
    assert off.keys() == start.keys()
    assert all(torch.equal(off[name], weight) for name, weight in start.items())
    assert not all(torch.equal(found[name], weight) for name, weight in start.items())


def test_answers_become_a_rollout():
    prompts, mask = torch.tensor([[0, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]])
    sampling = Sampling(3, (0, 2), 9)
    rollout = as_rollout(prompts, mask, sampling, [[4, 2], [3, 3, 3]], [[-1.0, -2.0], [-0.5, -0.25, -0.125]])
    assert rollout.response_ids.tolist() == [[4, 2, 9], [3, 3, 3]]
    assert rollout.response_mask.tolist() == [[True, True, False], [True, True, True]]
    assert rollout.ended.tolist() == [True, False]
    assert rollout.sampled_logprobs.tolist() == [[-1.0, -2.0, 0.0], [-0.5, -0.25, -0.125]]
    assert rollout.prompt_mask.tolist() == [[False, True], [True, True]]


def test_answers_shorter_than_the_limit_are_as_wide_as_it():
    rollout = as_rollout(torch.tensor([[5]]), torch.tensor([[1]]), Sampling(4, (0,), 0), [[0]], [[-1.0]])
    assert rollout.response_mask.tolist() == [[True, False, False, False]]
    assert rollout.response_ids.shape == rollout.sampled_logprobs.shape == (1, 4)


def test_without_vllm_it_says_so(short, fit, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it then fails
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(ValueError, match=r"`rollout_engine` VLLMEngine needs vLLM, which cannot be imported here"):
        fit(short(PPOModule)(rollout_engine=VLLMEngine()))


def test_four_bits_are_refused(short, monkeypatch):
    module = short(PPOModule)(rollout_engine=VLLMEngine(), lora_r=4, load_in_4bit=True)
    monkeypatch.setattr(TextModule, "setup", lambda self, stage: None)  # it wants a GPU for that
    with pytest.raises(ValueError, match="`load_in_4bit` must be false with `rollout_engine`"):
        module.setup("predict")


def test_it_is_a_flag(policy, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    flags = ["--model.rollout_engine=VLLMEngine", "--model.rollout_engine.max_model_len=64"]
    with pytest.raises(SystemExit):
        main(
            ["fit", "--model=PPOModule", f"--model.model={policy}", *flags, "--data=PromptDataModule", "--print_config"]
        )
    said = capsys.readouterr().out
    assert f"class_path: {engines.__name__}.VLLMEngine" in said
    assert "max_model_len: 64" in said


@pytest.mark.filterwarnings("ignore")  # of vLLM, and of Lightning about the process group that vLLM makes
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("lora_r", [0, 4])
def test_vllm_itself(short, fit, tmp_path, lora_r):
    """A model that vLLM's kernels take: heads of 32."""
    sizes = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=128)
    make_llama(vocab_size=8, **sizes).save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    engine = VLLMEngine(max_model_len=64, options={"enforce_eager": True})
    options = {"model": str(tmp_path / "policy"), "lora_r": lora_r, "learning_rate": 0.05, "max_new_tokens": 8}
    module = fit(short(PPOModule)(rollout_engine=engine, **options), max_epochs=3)
    found = figures(module)
    assert found["rollout/sampler_gap_max"] < 1e-4
    assert found["rollout/kl"] != 0.0  # the policy has moved, and the engine with it
