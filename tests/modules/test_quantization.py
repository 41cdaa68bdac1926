"""QLoRA: what is refused and in which words, that it is refused early, and, where bitsandbytes is, that it learns."""

import importlib.util

import pytest
import torch
from adapters import save_reward_adapter
from conftest import make_llama

from lightning_rlhf.callbacks import HuggingFaceExport
from lightning_rlhf.export import export
from lightning_rlhf.modules import RewardModule, SFTModule
from lightning_rlhf.modules.backbone import add_lora, load_causal_lm
from lightning_rlhf.modules.exporting import save_network
from lightning_rlhf.modules.quantization import check_4bit, check_available, in_4bit, is_4bit
from lightning_rlhf.modules.scorer import Scorer
from lightning_rlhf.modules.sharing import SharedBase, load_scorer

CUDA = torch.device("cuda")
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 1]])


@pytest.fixture
def pretend(monkeypatch):
    """That this machine has a GPU, or bitsandbytes, or has not."""

    def make(cuda: bool, bitsandbytes: bool) -> None:
        found = importlib.util.find_spec
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(
            "importlib.util.find_spec",
            lambda name, *rest: (bitsandbytes or None) if name == "bitsandbytes" else found(name, *rest),
        )

    return make


def test_each_missing_thing_has_its_own_message(pretend):
    pretend(cuda=False, bitsandbytes=True)
    with pytest.raises(ValueError, match=r"`load_in_4bit` must be False on a machine without an NVIDIA GPU.*dtype=bfl"):
        check_available()
    pretend(cuda=True, bitsandbytes=False)
    with pytest.raises(ValueError, match="`load_in_4bit` needs the package bitsandbytes: `pip install bitsandbytes`"):
        check_available()
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        in_4bit(torch.bfloat16)
    pretend(cuda=True, bitsandbytes=True)
    check_available()


def test_a_run_that_cannot_use_4_bits_is_refused(pretend):
    pretend(cuda=True, bitsandbytes=True)
    check_4bit(8, CUDA, None)
    with pytest.raises(ValueError, match=r"`load_in_4bit` must be False where `lora_r` is 0.*`lora_r=16`"):
        check_4bit(0, CUDA, None)
    with pytest.raises(ValueError, match=r"`load_in_4bit` must be False under `--trainer.strategy fsdp2`.*`ddp`"):
        check_4bit(8, CUDA, object())
    with pytest.raises(ValueError, match=r"on a device of type `cpu`.*`--trainer.accelerator gpu`"):
        check_4bit(8, torch.device("cpu"), None)
    pretend(cuda=True, bitsandbytes=False)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        check_4bit(8, CUDA, None)


@pytest.mark.parametrize(("lora_r", "message"), [(0, "where `lora_r` is 0"), (4, "on a device of type `cpu`")])
def test_modules_refuse_it_before_a_model_is_loaded(lora_r, message, policy, fit, ppo, monkeypatch):
    def reached(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("lightning_rlhf.modules.text_module.load_causal_lm", reached)
    for module in (SFTModule(policy, lora_r=lora_r, load_in_4bit=True), ppo(lora_r=lora_r, load_in_4bit=True)):
        with pytest.raises(ValueError, match=message):
            fit(module)


def test_without_a_trainer_it_is_refused_where_the_model_would_be_loaded(policy, pretend):
    pretend(cuda=False, bitsandbytes=False)
    with pytest.raises(ValueError, match="`load_in_4bit` must be False on a machine without an NVIDIA GPU"):
        SFTModule(policy, lora_r=4, load_in_4bit=True).configure_model()


def test_the_flag_reaches_policy_and_value_network(ppo, reward_folder, monkeypatch):
    seen = {}

    def remember(name, load):
        def loaded(spec, dtype, trust_remote_code, load_in_4bit, **options):
            seen[name] = load_in_4bit
            return load(spec, dtype, **options)

        return loaded

    monkeypatch.setattr("lightning_rlhf.modules.text_module.load_causal_lm", remember("policy", load_causal_lm))
    monkeypatch.setattr("lightning_rlhf.modules.ppo.load_scorer", remember("value", load_scorer))
    for flag in (False, True):
        ppo(lora_r=4, load_in_4bit=flag, value_model=reward_folder).configure_model()
        assert seen == {"policy": flag, "value": flag}


def test_the_flag_reaches_a_reward_model(policy, monkeypatch):
    seen, load = [], Scorer.load

    def loaded(spec, dtype, trust_remote_code, load_in_4bit):
        seen.append(load_in_4bit)
        return load(spec, dtype)

    monkeypatch.setattr(Scorer, "load", loaded)
    for flag in (False, True):
        RewardModule(policy, lora_r=4, load_in_4bit=flag).configure_model()
    assert seen == [False, True]


def test_the_export_command_writes_the_adapter_only_and_needs_no_gpu(fit, policy, tmp_path):
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "loss_mask": torch.ones_like(IDS).bool()}
    module = fit(SFTModule(policy, lora_r=4), [batch])
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["load_in_4bit"] = True
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"`--lora merged`: .* weights of 4 bits\. Give `--lora adapter`"):
        export(str(tmp_path / "a.ckpt"), str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()
    export(str(tmp_path / "a.ckpt"), str(tmp_path / "model"), lora="adapter")
    assert (tmp_path / "model/adapter_config.json").exists()


def test_an_export_that_would_merge_is_refused_before_training(fit, policy, monkeypatch):
    monkeypatch.setattr(SFTModule, "setup", lambda *_: None)
    module = SFTModule(policy, lora_r=4, load_in_4bit=True)
    with pytest.raises(ValueError, match=r"`HuggingFaceExport\(lora=merged\)`: with `load_in_4bit`.*`lora: adapter`"):
        fit(module, callbacks=[HuggingFaceExport()])


# --- where bitsandbytes is installed ------------------------------------------------------------------------------


@pytest.fixture
def bitsandbytes(monkeypatch):
    """It computes on CPUs, too, only slowly, and so it is refused there outside of tests."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("lightning_rlhf.modules.quantization.check_available", lambda: None)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    """A language model whose layers are whole blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("wide")
    make_llama(vocab_size=8, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore:bitsandbytes")
@pytest.mark.usefixtures("bitsandbytes")
class TestWithBitsandbytes:
    def test_layers_have_4_bits_and_heads_have_not(self, wide):
        policy, scorer = load_causal_lm(wide, "bfloat16", False, True), Scorer.load(wide, "bfloat16", False, True)
        for model, head in ((policy, policy.lm_head), (scorer.model, scorer.head)):
            assert is_4bit(model)
            packed = [p for p in model.parameters() if p.dtype == torch.uint8]
            assert len(packed) == 2 * 7
            weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # two layers: q, o; k, v; gate, up, down
            assert sum(p.numel() for p in packed) == weights / 2  # two to a byte
            assert head.weight.dtype == (torch.bfloat16 if model is policy else torch.float32)
            assert model.model.embed_tokens.weight.dtype == torch.bfloat16

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_adapters_learn_on_them(self, wide, checkpointing):
        module = SFTModule(wide, lora_r=4, load_in_4bit=True, gradient_checkpointing=checkpointing)
        module.configure_model()
        network = module.network
        ids = IDS.to(next(network.parameters()).device)
        optimizer = torch.optim.AdamW(module.parameter_groups(), lr=1e-2)
        losses = []
        for _ in range(20):
            loss = network(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert all(("lora_" in name) == p.requires_grad for name, p in network.named_parameters())

    def test_a_reward_models_adapter_shares_them(self, wide, tmp_path):
        adapter = save_reward_adapter(wide, tmp_path)
        policy = add_lora(load_causal_lm(wide, "float32", False, True), 4, 8, "all-linear")
        base = SharedBase(policy, wide, "float32")
        shared = load_scorer(adapter, "float32", load_in_4bit=True, base=base)
        separate = load_scorer(adapter, "float32", load_in_4bit=True)
        pointers = [{p.data_ptr() for p in network.parameters()} for network in (policy, shared, separate)]
        packed = {p.data_ptr() for p in policy.parameters() if p.dtype == torch.uint8}
        assert packed <= pointers[1]
        assert not pointers[0] & pointers[2]
        ids = IDS.to(shared.head.weight.device)
        with torch.no_grad():
            scores = [
                s(ids, torch.ones_like(ids)) for s in (shared, separate, Scorer.load(adapter, "float32").to(ids.device))
            ]
        torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=0)
        assert not torch.allclose(scores[0], scores[2], atol=1e-3)  # 4 bits are not 32
        whole = load_scorer(adapter, "float32", base=base)
        assert not is_4bit(whole.model)  # who does not ask for 4 bits does not get them

    def test_the_adapter_is_exported_and_fits_the_whole_base(self, wide, tmp_path):
        policy = add_lora(load_causal_lm(wide, "float32", False, True), 4, 8, "all-linear")
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        save_network(policy, tmp_path, base=wide)
        loaded = load_causal_lm(str(tmp_path), "float32")
        layer = policy.base_model.model.model.layers[0].mlp.up_proj
        delta = layer.get_delta_weight("default").cpu()
        before = load_causal_lm(wide, "float32").model.layers[0].mlp.up_proj.weight
        torch.testing.assert_close(loaded.model.layers[0].mlp.up_proj.weight, before + delta)
