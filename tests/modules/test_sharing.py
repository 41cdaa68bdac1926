"""One frozen base under policy, reference, value network and reward models."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapters import save_reward_adapter
from conftest import make_llama, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2ForSequenceClassification, LlamaForCausalLM

from lightning_rlhf.modules import RewardModule
from lightning_rlhf.modules.backbone import add_lora, load_causal_lm
from lightning_rlhf.modules.exporting import save_network
from lightning_rlhf.modules.lstm import LSTMConfig, LSTMForCausalLM
from lightning_rlhf.modules.reward_terms import Responses
from lightning_rlhf.modules.scorer import Scorer
from lightning_rlhf.modules.sharing import SharedBase, is_reward_adapter, load_scorer

IDS = torch.tensor([[1, 2, 3, 4, 0], [5, 6, 7, 1, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def adapter(policy, tmp_path_factory) -> str:
    """The adapter of a reward model on the policy's base."""
    return save_reward_adapter(policy, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def other_adapter(policy, tmp_path_factory) -> str:
    """Another on the same base."""
    return save_reward_adapter(policy, tmp_path_factory.mktemp("other_adapter"), seed=1, r=5)


def moved(network: nn.Module, seed: int = 7) -> nn.Module:
    """The network with all that is trained moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return network


def lora_policy(folder: str, dtype: str = "float32") -> nn.Module:
    """A policy that has trained for a while."""
    return moved(add_lora(load_causal_lm(folder, dtype), 4, 8, "all-linear"))


def pointers(*networks: nn.Module) -> dict[int, int]:
    """Where parameters are in memory, and their bytes."""
    parameters = [p for network in networks for p in network.parameters()]
    return {p.data_ptr(): p.numel() * p.element_size() for p in parameters}


def shares(network: nn.Module, policy: nn.Module) -> bool:
    return bool(pointers(network).keys() & pointers(policy).keys())


@torch.no_grad()
def scores(scorer: Scorer) -> torch.Tensor:
    return scorer(IDS, MASK)


# --- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rotary", "learned positions"])
def test_scores_on_the_policys_base_are_those_of_the_separate_model(kind, policy, adapter, learned_positions, tmp_path):
    if kind == "learned positions":
        learned_positions.save_pretrained(tmp_path / "base")
        policy = str(tmp_path / "base")
        adapter = save_reward_adapter(policy, tmp_path / "adapter")
    network = lora_policy(policy)
    shared = load_scorer(adapter, "float32", base=SharedBase(network, policy, "float32"))
    separate = Scorer.load(adapter, "float32")
    assert shares(shared, network)
    assert not shares(separate, network)
    torch.testing.assert_close(scores(shared), scores(separate))
    assert (shared.mean, shared.std) == (separate.mean, separate.std) == (0.5, 2.0)
    bare = Scorer.load(policy, "float32")  # the adapter does something, and so does the head
    bare.head.weight.data = separate.head.weight.data
    assert not torch.allclose(bare.raw(IDS, MASK), separate.raw(IDS, MASK), atol=0.1)


def test_in_bfloat16_base_and_rotary_frequencies_are_the_policys(policy, adapter):
    network = lora_policy(policy, "bfloat16")
    shared = load_scorer(adapter, "bfloat16", base=SharedBase(network, policy, "bfloat16"))
    own = Scorer.load(policy, "bfloat16").beside_adapter(adapter)
    torch.testing.assert_close(scores(shared), scores(own), rtol=0, atol=0)
    assert {p.dtype for name, p in shared.named_parameters() if "lora_" in name or "score" in name} == {torch.float32}
    assert {b.dtype for b in shared.buffers()} == {torch.float32}


def test_only_adapters_and_head_are_its_own(policy, adapter, other_adapter):
    network = lora_policy(policy)
    base = SharedBase(network, policy, "float32")
    scorers = [load_scorer(folder, "float32", base=base) for folder in (adapter, other_adapter)]
    in_base = {id(p) for name, p in network.named_parameters() if "lora_" not in name}
    own = [p for s in scorers for name, p in s.named_parameters() if "lora_" in name or name.endswith("score.weight")]
    for scorer in scorers:
        assert {id(p) for p in scorer.parameters()} <= in_base | {id(p) for p in own}
    total = sum(pointers(network, *scorers).values())
    assert total == sum(pointers(network).values()) + sum(4 * p.numel() for p in own)
    assert len({p.data_ptr() for p in own}) == len(own)  # each network has adapters and a head of its own


def test_no_network_feels_what_is_done_to_the_other(policy, adapter):
    network = lora_policy(policy).train()
    scorer = load_scorer(adapter, "float32", base=SharedBase(network, policy, "float32")).eval().requires_grad_(False)
    before, logits = scores(scorer), network(IDS).logits
    assert all(module.training for module in network.modules())
    assert {n for n, p in network.named_parameters() if p.requires_grad} == {
        n for n, _ in network.named_parameters() if "lora_" in n
    }
    with network.disable_adapter():
        torch.testing.assert_close(scores(scorer), before, rtol=0, atol=0)
        reference = network(IDS).logits
    torch.testing.assert_close(reference, load_causal_lm(policy, "float32")(IDS).logits)
    with scorer.model.disable_adapter():
        torch.testing.assert_close(network(IDS).logits, logits, rtol=0, atol=0)
    moved(network, seed=8)
    torch.testing.assert_close(scores(scorer), before, rtol=0, atol=0)
    assert not torch.allclose(network(IDS).logits, logits)


# --- what is not shared -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [{"dtype": "bfloat16"}, {"trust_remote_code": True}, {"base": "elsewhere"}, {"base": None}, {"adapter": "whole"}],
    ids=str,
)
def test_what_would_be_loaded_otherwise_is_loaded_separately(asked, policy, adapter, reward_folder, tmp_path):
    network = lora_policy(policy)
    options = {"dtype": asked.get("dtype", "float32"), "trust_remote_code": asked.get("trust_remote_code", False)}
    base = SharedBase(network, policy, "float32")
    if "base" in asked:  # the same weights, at another place
        load_causal_lm(policy, "float32").save_pretrained(tmp_path)
        base = asked["base"] and SharedBase(network, str(tmp_path), "float32")
    folder = reward_folder if "adapter" in asked else adapter
    scorer = load_scorer(folder, base=base, **options)
    assert not shares(scorer, network)
    assert not any("lora_" in name for name, _ in scorer.named_parameters())
    torch.testing.assert_close(scores(scorer), scores(Scorer.load(folder, **options)), rtol=0, atol=0)


def test_the_place_counts_not_how_it_is_written(policy, adapter, monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to(policy)
    monkeypatch.chdir(tmp_path)
    network = lora_policy(policy)
    assert shares(load_scorer(adapter, "float32", base=SharedBase(network, "link", "float32")), network)


def test_a_backbone_of_another_kind_is_not_put_in(policy, adapter, monkeypatch, learned_positions):
    other = GPT2ForSequenceClassification(learned_positions.config)
    monkeypatch.setattr(
        "lightning_rlhf.modules.sharing.AutoModelForSequenceClassification",
        SimpleNamespace(from_config=lambda *_, **__: other),
    )
    network = lora_policy(policy)
    scorer = load_scorer(adapter, "float32", base=SharedBase(network, policy, "float32"))
    assert not shares(scorer, network)
    torch.testing.assert_close(scores(scorer), scores(Scorer.load(adapter, "float32")), rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"bias": "all"}, {"init_lora_weights": "pissa"}, {"peft_type": "IA3"}, {}], ids=str)
def test_only_lora_layers_beside_a_base_leave_it_as_it_is(change, adapter, tmp_path):
    config = json.loads(Path(adapter, "adapter_config.json").read_text())
    if "peft_type" in change:
        config = {"base_model_name_or_path": config["base_model_name_or_path"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    (tmp_path / "adapter_model.safetensors").symlink_to(f"{adapter}/adapter_model.safetensors")
    assert is_reward_adapter(str(tmp_path)) == (not change)


def test_an_adapter_with_a_matrix_of_the_base_is_merged(adapter, tmp_path):
    """Such as embeddings that were trained, or have grown: loading them would change the policy's own."""
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.model.embed_tokens.weight": torch.zeros(8, 32)}, file)
    assert not is_reward_adapter(str(tmp_path / "adapter"))
    save_file(tensors, file)
    assert is_reward_adapter(str(tmp_path / "adapter"))


def test_a_language_models_adapter_has_no_head_and_is_merged(policy, tmp_path):
    network = lora_policy(policy)
    save_network(network, tmp_path, base=policy)
    assert not is_reward_adapter(str(tmp_path))
    scorer = load_scorer(str(tmp_path), "float32", base=SharedBase(network, policy, "float32"), keep_adapter=True)
    assert not any("lora_" in name for name, _ in scorer.named_parameters())
    assert not shares(scorer, network)


# --- in PPO -------------------------------------------------------------------------------------------------------


@pytest.fixture
def separately(monkeypatch):
    """Nothing is shared from now on."""

    def forbid():
        for module in ("ppo", "rollout_module"):
            monkeypatch.setattr(f"lightning_rlhf.modules.{module}.shared_base", lambda _: None)

    return forbid


def reward_networks(module) -> list[Scorer]:
    members = [m for term in module.rewards.terms.values() for m in getattr(term, "members", [term])]
    return [member._scorer for member in members]


def trained(module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


RUN = dict(lora_r=4, vf_coef=1.0, num_passes=2, adam_eps=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("last_layers", [None, 1])
def test_a_run_is_the_same_as_with_separate_networks(checkpointing, last_layers, ppo, fit, adapter, separately):
    options = RUN | dict(gradient_checkpointing=checkpointing, lora_last_layers=last_layers)
    runs = []
    for share in (True, False):
        if not share:
            separately()
        torch.manual_seed(0)
        module = ppo(reward=adapter, value_model=adapter, **options)
        module.configure_model()
        start = trained(module)
        fit(module, max_epochs=2)
        runs.append((module, trained(module)))
        assert shares(module.value, module.policy) == shares(reward_networks(module)[0], module.policy) == share
        changed = {name for name in start if not torch.equal(start[name], runs[-1][1][name])}
        assert changed == start.keys()
    (shared, ours), (separate, theirs) = runs
    assert shared.samples["response"] == separate.samples["response"]
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_one_base_carries_all_four_and_does_not_move(ppo, fit, policy, adapter, other_adapter):
    ensemble = {
        "class_path": "lightning_rlhf.modules.scoring.EnsembleReward",
        "init_args": {"models": [adapter, other_adapter]},
    }
    module = fit(ppo(reward=[adapter, ensemble], value_model=adapter, **RUN), max_epochs=2)
    assert module.reference.copy is None
    networks = [module.policy, module.value, *reward_networks(module)]
    assert len(networks) == 5
    base = LlamaForCausalLM.from_pretrained(policy)
    own = {
        p.data_ptr(): 4 * p.numel() for n in networks for k, p in n.named_parameters() if "lora_" in k or "score" in k
    }
    assert sum(pointers(*networks).values()) == sum(pointers(base).values()) + sum(own.values())
    names = {
        n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in module.policy.named_parameters()
    }
    torch.testing.assert_close(
        {n: p for n, p in names.items() if "lora_" not in n}, dict(base.named_parameters()), rtol=0, atol=0
    )
    separate = Scorer.load(adapter, "float32")  # rewards have not moved either
    torch.testing.assert_close(scores(reward_networks(module)[0]), scores(separate))
    assert not torch.allclose(scores(module.value), scores(separate), atol=1e-3)


def test_an_evaluation_may_come_first(ppo, fit, make_trainer, new_prompts, adapter):
    """It makes tensors in inference mode, which later do not go into autograd; a reward model's never do."""
    module = ppo(reward=adapter, value_model=adapter, **RUN)
    make_trainer().validate(module, datamodule=new_prompts(), verbose=False)
    first = trained(module)
    fit(module)
    after = trained(module)
    assert all(not torch.equal(first[name], after[name]) for name in first)


def test_scores_in_a_rollout_are_those_of_the_reward_model(ppo, fit, adapter):
    module = fit(ppo(reward=adapter, **RUN), max_epochs=2)
    given = Responses(module.samples["prompt"], module.samples["response"])
    texts = [[*map(ord, p + r), 0] for p, r in zip(given.prompts, given.texts, strict=True)]
    separate = Scorer.load(adapter, "float32")
    with torch.no_grad():
        alone = [separate(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)).item() for ids in texts]
    torch.testing.assert_close(torch.tensor(module.samples["reward"]), torch.tensor(alone))


def test_a_reward_run_leaves_an_adapter_that_shares(ppo, fit, policy, make_trainer, tmp_path):
    """From training to training, with nothing made by hand."""
    reward = RewardModule(policy, lora_r=2)
    reward.configure_model()
    moved(reward.network).set_normalizer(0.25, 1.5)
    reward.save_pretrained(tmp_path / "reward", merge=False)
    module = fit(
        ppo(reward=str(tmp_path / "reward"), value_model=str(tmp_path / "reward"), **RUN | {"learning_rate": 0.0})
    )
    (network,) = reward_networks(module)
    assert shares(network, module.policy)
    assert shares(module.value, module.policy)
    torch.testing.assert_close(scores(network), scores(reward.network))
    torch.testing.assert_close(scores(module.value), scores(reward.network))


def test_the_exported_policy_is_that_of_separate_networks(ppo, fit, adapter, separately, tmp_path):
    for folder in ("shared", "separate"):
        if folder == "separate":
            separately()
        torch.manual_seed(0)
        module = fit(ppo(reward=adapter, value_model=adapter, **RUN))
        with torch.no_grad():
            logits = module.policy(IDS).logits
        module.save_pretrained(tmp_path / folder)
        torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path / folder)(IDS).logits, logits)
    first, second = (
        LlamaForCausalLM.from_pretrained(tmp_path / folder).state_dict() for folder in ("shared", "separate")
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["no lora", "object", "another base", "another dtype"])
def test_policies_without_that_base_are_trained_as_ever(case, ppo, fit, policy, adapter, tmp_path):
    options = {"lora_r": 4}
    if case == "no lora":
        options = {"lora_r": 0}
    elif case == "object":
        options |= {"model": make_llama(vocab_size=8), "tokenizer": make_tokenizer()}
    elif case == "another base":
        make_llama(seed=3, vocab_size=8).save_pretrained(tmp_path / "lm")
        make_tokenizer().save_pretrained(tmp_path / "lm")
        options |= {"model": str(tmp_path / "lm")}
    reward = adapter
    if case == "another dtype":
        reward = {
            "class_path": "lightning_rlhf.modules.scoring.ModelReward",
            "init_args": {"model": adapter, "dtype": "bfloat16"},
        }
    module = fit(ppo(reward=reward, value_model=adapter, **options))
    (network,) = reward_networks(module)
    assert not shares(network, module.policy)
    assert shares(module.value, module.policy) == (case == "another dtype")


def test_a_recurrent_policy_takes_the_reward_model_as_it_is(ppo, fit, adapter, tmp_path):
    config = LSTMConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, eos_token_id=0, pad_token_id=0)
    LSTMForCausalLM(config).save_pretrained(tmp_path / "lstm")
    make_tokenizer().save_pretrained(tmp_path / "lstm")
    module = fit(ppo(model=str(tmp_path / "lstm"), reward=adapter, value_model=adapter))
    assert not shares(module.value, module.policy)
