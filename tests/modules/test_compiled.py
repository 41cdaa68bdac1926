"""Compiled decoder layers and compiled sampling: the same numbers, and one program for all shapes."""

import shutil

import pytest
import torch
from conftest import make_llama
from torch import nn
from torch._dynamo.utils import counters

from lightning_rlhf.modules import PPOModule, SFTModule, compiled_decoding
from lightning_rlhf.modules.backbone import add_lora
from lightning_rlhf.modules.compiled_decoding import CompiledDecoding, can_be_compiled
from lightning_rlhf.modules.compiled_layers import CompiledLayer
from lightning_rlhf.modules.engines import VLLMEngine
from lightning_rlhf.modules.lstm import LSTMConfig, LSTMForCausalLM
from lightning_rlhf.modules.reading import read, set_fast_paths
from lightning_rlhf.modules.rollout import Sampling, sample

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
# torch meets it itself while it compiles, and would mute it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")


@pytest.fixture(autouse=True)
def without_programs_of_other_tests() -> None:
    torch.compiler.reset()
    counters.clear()


@pytest.fixture
def uncompiled(monkeypatch) -> list[torch.Size]:
    """The program of a step as it is written; the shapes of the masks that it met."""
    met = []

    def program(model: nn.Module, **inputs: object) -> torch.Tensor:
        met.append(inputs["attention_mask"].shape)
        return model(use_cache=True, logits_to_keep=1, **inputs).logits

    monkeypatch.setattr(compiled_decoding, "_program", program)
    return met


def with_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    adapted = add_lora(model, 2, 4, "all-linear")
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return adapted


def prompts(copies: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[0, 1, 5, 3], [0, 0, 0, 4], [2, 6, 6, 1]]).repeat_interleave(copies, 0)
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]).repeat_interleave(copies, 0)
    return ids, mask


def assert_same_rollouts(model: nn.Module, copies: int, compact: bool = True, tokens: int = 20) -> None:
    ids, mask = prompts(copies)
    noise = torch.rand(len(ids), tokens, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    arguments = (model, ids, mask, Sampling(tokens, (0, 3), 0), noise)
    plain = sample(*arguments)
    compiled = sample(*arguments, compact=compact, decoding=CompiledDecoding)
    for mine, theirs in zip(compiled[:-1], plain[:-1], strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(compiled.sampled_logprobs, plain.sampled_logprobs)
    assert len(set(plain.response_mask.sum(1).tolist())) > 1


@pytest.mark.parametrize("kind", ["rotary", "learned positions", "lora", "padded"])
@pytest.mark.parametrize("compact", [True, False])
def test_a_cache_of_fixed_size_gives_the_same_rollouts(learned_positions, uncompiled, kind, compact):
    model = learned_positions if kind == "learned positions" else make_llama(vocab_size=8).eval()
    if kind == "lora":
        model = with_lora(model)
    if kind != "padded":
        set_fast_paths(model, True, True, True)
    assert can_be_compiled(model)
    assert_same_rollouts(model, copies=3, compact=compact)
    assert set(uncompiled) == {(9, 128)}  # all rows to the end


def test_longer_ones_have_room(uncompiled):
    model = make_llama(vocab_size=8, max_position_embeddings=256, initializer_range=0.05).eval()
    assert_same_rollouts(model, copies=1, tokens=130)
    assert set(uncompiled) == {(3, 256)}


def test_it_is_looked_now_and_then_whether_all_have_ended(uncompiled):
    model, (ids, mask) = make_llama(vocab_size=8).eval(), prompts()
    noise = torch.rand(3, 30, dtype=torch.float64)
    rollout = sample(model, ids, mask, Sampling(30, tuple(range(8)), 0), noise, decoding=CompiledDecoding)
    assert rollout.response_mask.sum(1).tolist() == [1, 1, 1]  # any token is an end
    assert len(uncompiled) == 7  # the eighth is not read


@needs_compiler
def test_the_program_gives_the_same_rollouts():
    model = make_llama(vocab_size=8).eval()
    set_fast_paths(model, True, True, True)
    for copies in (1, 2, 2, 3):
        assert_same_rollouts(model, copies)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # for the first batch, and for any


def test_what_cannot_be_compiled():
    assert not can_be_compiled(LSTMForCausalLM(LSTMConfig(vocab_size=8, hidden_size=8)))
    assert not can_be_compiled(nn.Linear(2, 2))


@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_rollouts_is_a_flag(short, new_prompts, uncompiled, compiled):
    module = short(PPOModule)(compiled_rollouts=compiled, dtype="bfloat16")
    module.configure_model()
    module._seed = 1
    module.roll_out(new_prompts().batch(["\1\2"] * 4), range(4))
    assert bool(uncompiled) == compiled


def test_flags_that_exclude_each_other(short, fit, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`compiled_rollouts` must be false with `rollout_engine`"):
        fit(short(PPOModule)(compiled_rollouts=True, rollout_engine=VLLMEngine()))
    LSTMForCausalLM(LSTMConfig(vocab_size=8, hidden_size=8)).save_pretrained(tmp_path)
    module = short(PPOModule)(model=str(tmp_path), tokenizer=tokenizer, compiled_rollouts=True)
    with pytest.raises(ValueError, match="`compiled_rollouts` must be false for a LSTMForCausalLM"):
        fit(module)


# --- layers ---------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    where = mask.bool().clone()
    where[:, :2] = False
    model.zero_grad()
    said = read(model, ids, mask, where, with_entropy=True)
    (said.logprobs + said.entropy).sum().backward()
    with torch.no_grad():
        assert torch.equal(read(model, ids, mask, where).logprobs, said.logprobs.detach())
    return said.logprobs.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@needs_compiler
@pytest.mark.parametrize("kind", ["padding-free", "padded", "checkpointing", "lora"])
def test_compiled_layers_have_the_same_gradients(kind):
    plain, compiled = (
        with_lora(make_llama(vocab_size=11)) if kind == "lora" else make_llama(vocab_size=11) for _ in "12"
    )
    set_fast_paths(plain, False, False, False)
    set_fast_paths(compiled, kind != "padded", True, True, compiled_layers=True)
    layers = [module for module in compiled.modules() if isinstance(module, CompiledLayer)]
    assert len(layers) == 2
    assert len(set(map(type, layers))) == 1  # else each would be compiled by itself
    compiled.train()
    if kind == "checkpointing":
        compiled.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    graphs = []
    for rows, length in ((4, 9), (5, 12), (3, 40), (6, 70), (2, 7)):
        ids, mask = torch.randint(1, 11, (rows, length)), torch.ones(rows, length, dtype=torch.long)
        mask[0, -3:] = 0
        (mine, of_mine), (theirs, of_theirs) = gradients(compiled, ids, mask), gradients(plain, ids, mask)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        assert of_mine.keys() == of_theirs.keys()
        for name, gradient in of_theirs.items():
            torch.testing.assert_close(of_mine[name], gradient, rtol=1e-3, atol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 5
    assert graphs[0] > 0


@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_layers_is_a_flag(policy, fit, compiled):
    module = SFTModule(policy, compiled_layers=compiled)
    module.configure_model()
    layers = [module for module in module.network.modules() if isinstance(module, CompiledLayer)]
    assert len(layers) == (2 if compiled else 0)


def test_sampling_goes_through_the_layers_as_they_are(monkeypatch):
    model, compiled = make_llama(vocab_size=8).eval(), make_llama(vocab_size=8).eval()
    set_fast_paths(compiled, True, True, False, compiled_layers=True)
    monkeypatch.setattr(type(compiled.model.layers[0]), "program", None)
    ids, mask = prompts()
    noise = torch.rand(3, 9, dtype=torch.float64)
    found, expected = (sample(m, ids, mask, Sampling(9, (0,), 0), noise) for m in (compiled, model))
    assert torch.equal(found.response_ids, expected.response_ids)


@needs_compiler
def test_a_run_ends_in_the_same_weights(short, fit, reward_folder):
    runs = []
    for flag in (True, False):
        options = {"reward": reward_folder, "adam_eps": 1.0, "learning_rate": 0.1}
        module = fit(short(PPOModule)(**options, compiled_layers=flag, compiled_rollouts=flag), max_epochs=2)
        runs.append((module.samples["response"], {n: p.detach() for n, p in module.named_parameters()}))
    (responses, weights), (expected_responses, expected) = runs
    assert responses == expected_responses
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5)
