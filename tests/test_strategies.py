"""`fsdp2` in a group of one: what it gathers when, and what is refused. Two ranks are in tests/distributed."""

import os
import shutil
from types import SimpleNamespace
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy, StrategyRegistry
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from lightning_rlhf.datamodules import PromptDataModule
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.modules.checks import check_strategy
from lightning_rlhf.modules.sharding import is_sharded
from lightning_rlhf.strategies import FSDP2Strategy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


@pytest.fixture
def _group():
    """Leaves neither a process group nor environment variables behind."""
    with mock.patch.dict(os.environ):
        yield
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture
def train(tmp_path, make_trainer, _group):
    """One iteration of PPO under a strategy."""
    make_llama(vocab_size=8).save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    prompts = Dataset.from_dict({"prompt": ["\1", "\2\3", "\4\5\6", "\7"]})

    def run(strategy, hooks=(), **options):
        L.seed_everything(0, verbose=False)
        settings = dict(rollout_batch_size=4, minibatch_size=4, num_passes=1, max_new_tokens=4, min_new_tokens=4)
        module = PPOModule(str(tmp_path / "policy"), zeros, **(settings | options))
        trainer = make_trainer(max_epochs=1, strategy=strategy, log_every_n_steps=1, callbacks=[*hooks])
        trainer.fit(module, PromptDataModule(prompts))
        return module

    return run


def zeros(prompts, responses, **columns):
    return [0.0] * len(prompts)


class Gathers(L.Callback):
    """How often a unit's weights were gathered until the update began."""

    def __init__(self, monkeypatch):
        self.count, self.in_rollout = 0, 0
        gather = _fsdp_param_group.FSDPParamGroup.unshard

        def unshard(group, *args, **kwargs):
            self.count += group._all_gather_result is None and not group.is_unsharded
            return gather(group, *args, **kwargs)

        monkeypatch.setattr(_fsdp_param_group.FSDPParamGroup, "unshard", unshard)

    def on_train_batch_start(self, *_):
        self.in_rollout = self.in_rollout or self.count


@pytest.mark.parametrize(("unshard", "grows"), [(True, False), (False, True)])
def test_a_rollout_gathers_the_policy_once_or_for_every_token(train, monkeypatch, unshard, grows):
    counts = []
    for tokens in (2, 10):
        with monkeypatch.context() as patch:
            gathers = Gathers(patch)
            train(FSDP2Strategy(unshard_rollouts=unshard), [gathers], max_new_tokens=tokens, min_new_tokens=tokens)
            counts.append(gathers.in_rollout)
    units = 3  # two blocks and the rest
    assert counts[1] - counts[0] == (8 * units if grows else 0)


@pytest.mark.parametrize("strategy", ["fsdp2", FSDP2Strategy(unshard_rollouts=False)], ids=["fsdp2", "in step"])
def test_all_networks_are_sharded_and_end_sharded(train, strategy):
    module = train(strategy)
    assert all(is_sharded(network) for network in (module.policy, module.value, module.reference.copy))
    assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in module.parameters())


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
def test_compiled_layers_are_sharded_like_others(train):
    weights = [
        dict(train("fsdp2", compiled_layers=flag, adam_eps=1.0, learning_rate=0.01).named_parameters())
        for flag in (True, False)
    ]
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name].full_tensor(), weight.full_tensor(), rtol=1e-3, atol=1e-5)


def test_compiled_rollouts_want_whole_weights(train):
    with pytest.raises(ValueError, match=r"`compiled_rollouts` must be false under `--trainer\.strategy fsdp2`"):
        train("fsdp2", compiled_rollouts=True)


def test_the_name_is_known_to_lightning():
    assert "fsdp2" in StrategyRegistry.available_strategies()


def test_a_mixture_of_precisions_that_cannot_work_is_refused(train):
    with pytest.raises(ValueError, match=r"does not support .*16-mixed|16-mixed.* without sharding"):
        L.Trainer(strategy=FSDP2Strategy(), accelerator="cpu", devices=1, precision="16-mixed", logger=False)
    plugin = SimpleNamespace(precision="16-mixed")
    module = PPOModule("nowhere", zeros, dtype="bfloat16")
    module._trainer = SimpleNamespace(strategy=SingleDeviceStrategy(), precision_plugin=plugin)
    module._fabric = None
    with pytest.raises(ValueError, match=r"`dtype` float32 \(here bfloat16\).*Use `bf16-mixed`"):
        module.setup("fit")


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy(), DDPStrategy(), FSDP2Strategy()])
def test_strategies_that_average_gradients_are_accepted(strategy):
    check_strategy(SimpleNamespace(strategy=strategy), None)


def test_fsdp1_is_refused_by_a_message_that_names_fsdp2():
    with pytest.raises(ValueError, match=r"FSDPStrategy cannot train this module.*give `fsdp2`, or `ddp`"):
        check_strategy(SimpleNamespace(strategy=FSDPStrategy()), None)


def test_tensor_parallelism_is_refused():
    class Mesh(dict):
        mesh_dim_names = ("data_parallel", "tensor_parallel")

    mesh = Mesh(tensor_parallel=SimpleNamespace(size=lambda: 2))
    with pytest.raises(ValueError, match="tensor parallelism is not supported"):
        check_strategy(SimpleNamespace(strategy=FSDP2Strategy()), mesh)
