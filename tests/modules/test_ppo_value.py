"""PPO's separate value network under LoRA: what it starts from, what of it is trained, saved and resumed."""

import json
import shutil

import pytest
import torch
from adapters import save_reward_adapter
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import LlamaForCausalLM

from lightning_rlhf.modules.scorer import Scorer

KINDS = ["whole", "adapter", "adapter of another base"]


@pytest.fixture(scope="module")
def value_models(policy, reward_folder, tmp_path_factory) -> dict[str, str]:
    """A whole reward model, an adapter on the policy's base, and one on the same weights at another place."""
    folder = tmp_path_factory.mktemp("values")
    LlamaForCausalLM.from_pretrained(policy).save_pretrained(folder / "base")
    return {
        "whole": reward_folder,
        "adapter": save_reward_adapter(policy, folder / "adapter"),
        "adapter of another base": save_reward_adapter(str(folder / "base"), folder / "other"),
    }


@pytest.fixture(params=KINDS)
def make(request, ppo, value_models):
    """PPO with LoRA and a separate value network."""

    def make(**options):
        settings = dict(lora_r=4, vf_coef=1.0, value_model=value_models[request.param], adam_eps=1e-3)
        return ppo(**(settings | options))

    make.kind, make.folder = request.param, value_models[request.param]
    return make


def trained(module) -> set[str]:
    return {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}


def state(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def test_the_start_is_the_reward_model(make, fit):
    module = fit(make(learning_rate=0.0))
    e = module._experience.experience
    ids = torch.cat([e.prompt_ids, e.response_ids], dim=1)
    mask = torch.cat([e.prompt_mask, e.response_mask], dim=1)
    expected = Scorer.load(make.folder, "float32")  # adapters merged
    for i, width in enumerate(e.response_mask.sum(1).tolist()):
        for t in range(width):
            end = e.prompt_ids.shape[1] + t
            row = ids[i, :end][mask[i, :end].bool()][None]
            with torch.no_grad():
                raw = expected.raw(row, torch.ones_like(row))[0]
            torch.testing.assert_close(e.values[i, t], (raw - expected.mean) / expected.std)


def test_adapters_and_head_are_trained_and_nothing_else(make, fit):
    module = make()
    module.configure_model()
    before = state(module)
    fit(module, max_epochs=2)
    after = state(module)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == trained(module)
    assert all("lora_" in name or name == "value.model.base_model.model.score.weight" for name in changed)
    ranks = {p.shape[0] for name, p in module.value.named_parameters() if "lora_A" in name}
    assert ranks == ({4} if make.kind == "whole" else {3})  # an adapter goes on as it is


def test_the_optimizers_groups_are_policy_and_value(make, fit):
    module = fit(make(value_learning_rate=1e-3, learning_rate=1e-2))
    policy, value = module.trainer.optimizers[0].param_groups
    assert (policy["name"], policy["lr"], value["name"], value["lr"]) == ("policy", 1e-2, "value", 1e-3)
    for group, network in ((policy, module.policy), (value, module.value)):
        assert {id(p) for p in group["params"]} == {id(p) for p in network.parameters() if p.requires_grad}


def test_a_checkpoint_holds_what_is_trained(make, fit, tmp_path):
    module = fit(make())
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    names = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"].keys()
    assert names == trained(module)
    assert {name.partition(".")[0] for name in names} == {"policy", "value"}


def test_a_resumed_run_equals_the_uninterrupted_one(make, fit, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1, save_weights_only=False)
    options = dict(reward=make.folder)
    whole = fit(make(**options), max_epochs=3, callbacks=[keep], enable_checkpointing=True)
    resumed = fit(make(**options), max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    torch.testing.assert_close(state(resumed), state(whole), rtol=0, atol=0)
    assert resumed.samples == whole.samples


def test_the_value_loss_does_not_reach_the_policy(make, fit, new_gradients):
    """Not even where both stand on the same base."""
    found = []
    for vf_coef in (0.0, 1.0):
        watch = new_gradients()
        torch.manual_seed(0)
        fit(make(vf_coef=vf_coef, minibatch_size=6, learning_rate=0.0), callbacks=[watch])
        found.append(watch.steps[0])
    (without, with_loss) = found
    for name in with_loss:
        if name.startswith("policy."):
            torch.testing.assert_close(with_loss[name], without[name], rtol=0, atol=0)
        else:
            assert not without[name].any()
    assert any(g.any() for name, g in with_loss.items() if name.startswith("value."))


@pytest.mark.parametrize("last_layers", [None, 1])
def test_gradient_checkpointing_changes_no_gradient(make, fit, new_gradients, last_layers):
    found = []
    for checkpointing in (False, True):
        watch = new_gradients()
        torch.manual_seed(0)
        options = dict(gradient_checkpointing=checkpointing, lora_last_layers=last_layers, minibatch_size=3)
        module = fit(make(**options), callbacks=[watch])
        for network in (module.policy, module.value):
            layers = {m.gradient_checkpointing for m in network.modules() if hasattr(m, "gradient_checkpointing")}
            assert layers == {checkpointing}
        found.append(watch.steps)
    assert len(found[0]) == 2  # the second with adapters that are no longer 0
    names = {name for name, g in found[0][1].items() if g.any()}
    assert names == {name for name in found[0][1] if name.startswith(("policy.", "value."))}
    torch.testing.assert_close(*found)


def test_micro_batches_make_no_difference(make, fit):
    runs = []
    for size, accumulate in ((6, 1), (2, 3)):
        torch.manual_seed(0)
        module = fit(make(minibatch_size=size), max_epochs=2, accumulate_grad_batches=accumulate)
        runs.append({name: p for name, p in module.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*runs, rtol=0, atol=1e-5)


def test_dropout_of_a_foreign_adapter_is_off(ppo, value_models, tmp_path):
    """Or values would differ between two passes over the same text."""
    folder = tmp_path / "adapter"
    shutil.copytree(value_models["adapter"], folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"lora_dropout": 0.5}))
    module = ppo(lora_r=4, value_model=str(folder))
    module.configure_model()
    assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in module.value.modules())


def test_without_lora_an_adapters_value_network_is_trained_whole(ppo, fit, value_models):
    module = ppo(value_model=value_models["adapter"], vf_coef=1.0)
    module.configure_model()
    before = state(module.value)
    assert not any("lora_" in name for name in before)
    fit(module)
    assert all(not torch.equal(value, before[name]) for name, value in module.value.state_dict().items())


def test_the_normaliser_is_the_reward_models(ppo, value_models):
    for kind, expected in (("whole", (0.75, 2.5)), ("adapter", (0.5, 2.0))):
        module = ppo(lora_r=4, value_model=value_models[kind])
        module.configure_model()
        assert (module.value.mean, module.value.std) == expected
