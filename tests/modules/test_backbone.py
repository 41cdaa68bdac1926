"""Loading, LoRA, the frozen reference, and how a network is read."""

import copy
import math

import pytest
import torch
from adapters import save_reward_adapter
from conftest import make_llama
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lightning_rlhf.modules.backbone import add_lora, load_causal_lm, unwrapped
from lightning_rlhf.modules.lstm import LSTMConfig, LSTMForCausalLM, LSTMForSequenceClassification
from lightning_rlhf.modules.reading import logits_at
from lightning_rlhf.modules.scorer import Scorer, merged

IDS = torch.tensor([[1, 2, 3, 4, 5]])


def adapted(seed=0, **options):
    """A LoRA model whose adapters do something."""
    model = add_lora(make_llama(seed, vocab_size=8), **(dict(r=4, alpha=8, target_modules="all-linear") | options))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_models_are_loaded_in_the_dtype_asked_for(policy, dtype):
    for spec in (policy, make_llama(vocab_size=8)):
        assert {p.dtype for p in load_causal_lm(spec, dtype).parameters()} == {getattr(torch, dtype)}


def test_dropout_is_off(tmp_path):
    config = GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    assert config.attn_pdrop == config.resid_pdrop == config.embd_pdrop == 0.1
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), "float32").train()
    assert torch.equal(logits(model), logits(model))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_an_adapter_starts_as_nothing_and_alone_is_trained():
    model = add_lora(make_llama(vocab_size=8), r=4, alpha=8, target_modules="all-linear")
    torch.testing.assert_close(logits(model), logits(make_llama(vocab_size=8)))
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
@pytest.mark.parametrize("last_layers", [None, 1])
def test_a_scalar_head_is_trained_whole_beside_the_adapters(reward_folder, targets, last_layers):
    model = add_lora(Scorer.load(reward_folder, "float32").model, 4, 8, targets, last_layers)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name in trained if "lora_" not in name] == ["base_model.model.score.weight"]


@pytest.mark.parametrize("last_layers", [None, 1])
@pytest.mark.parametrize("kind", [LSTMForCausalLM, LSTMForSequenceClassification])
def test_a_model_without_linear_layers_takes_no_adapters(kind, last_layers):
    model = kind(LSTMConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_labels=1))
    with pytest.raises(ValueError, match=r"`lora_r` must be 0 for a model of type `lightning_rlhf_lstm`.* but got 4"):
        add_lora(model, 4, 8, "all-linear", last_layers)


def test_merging_computes_the_same_and_leaves_the_given_model_alone():
    model = adapted()
    before = {name: p.clone() for name, p in model.named_parameters()}
    whole = merged(model)
    assert not torch.allclose(logits(whole), logits(make_llama(vocab_size=8)))
    torch.testing.assert_close(logits(whole), logits(model))
    assert not any("lora" in name for name in whole.state_dict())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    plain = make_llama(vocab_size=8)
    assert merged(plain) is plain
    assert unwrapped(plain) is plain
    assert unwrapped(model) is model.base_model.model


BATCH = torch.tensor([[0, 0, 1, 2, 3, 4], [5, 6, 7, 1, 2, 0]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


@pytest.mark.parametrize("make", [lambda: make_llama(vocab_size=8), adapted], ids=["full", "lora"])
def test_logits_at_some_positions_are_those_of_all(make):
    model = make()
    where = torch.tensor([[0, 0, 1, 0, 0, 1], [0, 1, 1, 1, 0, 0]]).bool()
    with torch.no_grad():
        expected = model(BATCH, attention_mask=MASK).logits[where]
        torch.testing.assert_close(logits_at(model, BATCH, MASK, where), expected)
        assert model(BATCH, attention_mask=MASK).logits.shape == (2, 6, 8)  # nothing stays behind


def test_a_failed_forward_leaves_no_hook_behind():
    model = make_llama(vocab_size=8)
    with pytest.raises(IndexError):
        logits_at(model, BATCH + 100, MASK, MASK.bool())
    assert logits(model).shape == (1, 5, 8)


# --- scorers ------------------------------------------------------------------------------------------------------


def test_a_new_head_is_drawn_from_the_narrow_normal(tmp_path):
    make_llama(vocab_size=8, hidden_size=1024, intermediate_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    head = Scorer.load(str(tmp_path), "float32").head
    assert head.weight.shape == (1, 1024)
    assert head.bias is None
    assert head.weight.mean().item() == pytest.approx(0, abs=4 / 1025)
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.1)  # 0.3 is the model's own


def test_the_backbone_of_a_new_scorer_is_the_language_model(policy):
    scorer = Scorer.load(policy, "float32")
    backbone = AutoModelForCausalLM.from_pretrained(policy).model.state_dict()
    assert all(torch.equal(v, backbone[k]) for k, v in scorer.model.model.state_dict().items())
    assert (scorer.mean, scorer.std) == (0.0, 1.0)


def test_a_reward_models_folder_is_loaded_as_it_is(reward_folder):
    first, second = Scorer.load(reward_folder, "float32"), Scorer.load(reward_folder, "float32")
    assert torch.equal(first.head.weight, second.head.weight)
    assert (first.mean, first.std) == (0.75, 2.5)
    raw = first.raw(BATCH[1:], MASK[1:])
    torch.testing.assert_close(first(BATCH[1:], MASK[1:]), (raw - 0.75) / 2.5)


def test_bfloat16_scorers_keep_every_digit_of_the_head(reward_folder):
    narrow, wide = Scorer.load(reward_folder, "bfloat16"), Scorer.load(reward_folder, "float32")
    assert torch.equal(narrow.head.weight, wide.head.weight)
    assert {p.dtype for p in narrow.model.model.parameters()} == {torch.bfloat16}
    assert narrow(BATCH[1:], MASK[1:]).dtype == torch.float32


def test_a_model_object_is_taken_as_it_is_with_a_head_in_float32(reward_folder):
    model = Scorer.load(reward_folder, "float32").model
    head = model.score.weight.clone()
    scorer = Scorer.load(model, "bfloat16")
    assert scorer.model is model
    assert torch.equal(scorer.head.weight, head)
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["rotary", "learned positions"])
@torch.no_grad()
def test_scores_per_token_are_those_of_the_prefixes(reward_folder, learned_positions, tmp_path, kind):
    learned_positions.save_pretrained(tmp_path)
    scorer = Scorer.load(reward_folder if kind == "rotary" else str(tmp_path), "float32").eval()
    per_token = scorer.raw_per_token(BATCH, MASK)
    for row, mask, got in zip(BATCH, MASK.bool(), per_token, strict=True):
        ids = row[mask]
        for n in range(1, len(ids) + 1):
            prefix = ids[None, :n]
            torch.testing.assert_close(scorer.raw(prefix, torch.ones_like(prefix))[0], got[mask][n - 1])
    torch.testing.assert_close(scorer.raw(BATCH, MASK), per_token[[0, 1], [5, 4]])


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_scorer_comes_back_with_its_normaliser(reward_folder, tmp_path, lora):
    scorer = Scorer.load(reward_folder, "float32")
    if lora:
        scorer = Scorer(add_lora(scorer.model, 4, 8, "all-linear"))
        torch.nn.init.normal_(scorer.head.weight)
    scorer.set_normalizer(-1.5, 0.25)
    scorer.save_pretrained(tmp_path)
    loaded = Scorer.load(str(tmp_path), "float32")
    assert (loaded.mean, loaded.std) == (-1.5, 0.25)
    with torch.no_grad():
        torch.testing.assert_close(loaded(BATCH, MASK), scorer(BATCH, MASK))


def test_copies_of_a_scorer_have_normalisers_of_their_own(reward_folder):
    scorer = Scorer.load(reward_folder, "float32")
    copy.deepcopy(scorer).set_normalizer(9.0, 9.0)
    assert (scorer.mean, scorer.std) == (0.75, 2.5)


# --- adapters of reward models, numbers, bits ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(policy, tmp_path_factory) -> str:
    """The folder of a reward model's adapter."""
    return save_reward_adapter(policy, tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_beside_the_weights_is_trainable_and_computes_what_the_merged_one_does(policy, adapter, dtype):
    scorer = Scorer.load(policy, dtype).beside_adapter(adapter)
    merged_one = Scorer.load(adapter, "float32")
    assert torch.equal(scorer.head.weight, merged_one.head.weight)
    assert (scorer.mean, scorer.std) == (merged_one.mean, merged_one.std) == (0.5, 2.0)
    trained = {name for name, p in scorer.named_parameters() if p.requires_grad}
    assert trained == {
        name for name, _ in scorer.named_parameters() if "lora_" in name or name.endswith("score.weight")
    }
    assert {p.dtype for name, p in scorer.named_parameters() if name in trained} == {torch.float32}
    with torch.no_grad():
        tolerance = {} if dtype == "float32" else dict(rtol=0.05, atol=0.2)
        torch.testing.assert_close(scorer.raw(BATCH, MASK), merged_one.raw(BATCH, MASK), **tolerance)


def test_an_adapter_of_another_size_is_refused(adapter, tmp_path):
    make_llama(vocab_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"The adapter `.*` does not fit its base model, see `.*layers\.1\."):
        Scorer.load(str(tmp_path), "float32").beside_adapter(adapter)


def test_a_shape_takes_the_shape_of_an_adapter(policy, adapter):
    with torch.device("meta"):
        shape = Scorer.load(policy, "float32").beside_adapter(adapter)
    whole = Scorer.load(policy, "float32").beside_adapter(adapter)
    assert {p.device.type for p in shape.parameters()} == {"meta"}
    sizes = [{name: (p.shape, p.requires_grad) for name, p in s.named_parameters()} for s in (shape, whole)]
    assert sizes[0] == sizes[1]
    assert (shape.mean, shape.std) == (0.5, 2.0)


def test_conv1d_layers_take_adapters_without_a_warning(learned_positions):
    reference = copy.deepcopy(learned_positions)
    model = add_lora(learned_positions, 2, 4, "all-linear")
    torch.testing.assert_close(logits(model), logits(reference))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    torch.testing.assert_close(logits(merged(model)), logits(model))
    assert not torch.allclose(logits(model), logits(reference))


def test_rotary_frequencies_stay_in_float32(reward_folder, policy, adapter):
    """In bfloat16 the error of an angle would grow with the position."""
    exact = make_llama().model.rotary_emb.inv_freq
    models = [
        Scorer.load(reward_folder, "bfloat16"),
        Scorer.load(adapter, "bfloat16"),
        Scorer.load(Scorer.load(reward_folder, "float32").model, "bfloat16"),
        load_causal_lm(policy, "bfloat16"),
        load_causal_lm(make_llama(vocab_size=8), "bfloat16"),
    ]
    for model in models:
        (frequencies,) = {b.data_ptr(): b for name, b in model.named_buffers() if name.endswith(".inv_freq")}.values()
        torch.testing.assert_close(frequencies, exact, rtol=0, atol=0)


# --- 4 bits -------------------------------------------------------------------------------------------------------


class Reached(Exception):
    """Instead of a load: with which arguments it would have been."""


@pytest.fixture
def loading(monkeypatch):
    """Lets 4 bits pass for available, and models not be loaded."""

    def reached(spec, **options):
        raise Reached(spec, options)

    monkeypatch.setattr("lightning_rlhf.modules.quantization.check_available", lambda: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", reached)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", reached)


@pytest.mark.parametrize("load", [load_causal_lm, Scorer.load])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bitsandbytes_is_asked_for_4_bits(load, dtype, loading, policy):
    with pytest.raises(Reached) as reached:
        load(policy, dtype, load_in_4bit=True)
    spec, options = reached.value.args
    config = options["quantization_config"]
    assert spec == policy
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == getattr(torch, dtype)
    assert set(config.llm_int8_skip_modules) == {"lm_head", "score"}
    assert options["dtype"] == (getattr(torch, dtype) if load is load_causal_lm else torch.float32)
    with pytest.raises(Reached) as reached:
        load(policy, dtype)
    assert "quantization_config" not in reached.value.args[1]


@pytest.mark.parametrize("load", [load_causal_lm, Scorer.load])
def test_only_a_whole_models_folder_is_read_in_4_bits(load, loading, adapter):
    with pytest.raises(ValueError, match="`load_in_4bit` reads a whole model's folder or hub id, but got a model obj"):
        load(make_llama(), "bfloat16", load_in_4bit=True)
    with pytest.raises(ValueError, match=f"but got the adapter `{adapter}`.*`--lora merged`"):
        load(adapter, "bfloat16", load_in_4bit=True)


@pytest.mark.parametrize("scorer", [False, True])
def test_nothing_is_merged_into_4_bits(scorer, reward_folder):
    model = add_lora(Scorer.load(reward_folder, "float32").model, 2, 4, "all-linear")
    unwrapped(model).is_loaded_in_4bit = True
    with pytest.raises(ValueError, match=r"cannot be merged into weights of 4 bits.*`--lora adapter`"):
        merged(Scorer(model) if scorer else model)
