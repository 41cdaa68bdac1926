"""Checkpoints of every kind become folders whose models compute what the live module computed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from processes import ranks, run_together
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf.datamodules import PreferenceDataModule, PromptDataModule, SFTDataModule
from lightning_rlhf.export import export, read_checkpoint
from lightning_rlhf.modules import PPOModule, RewardModule, SFTModule
from lightning_rlhf.modules.backbone import load_causal_lm
from lightning_rlhf.modules.scorer import Scorer
from lightning_rlhf.modules.scoring import ModelReward, Responses
from lightning_rlhf.strategies import FSDP2Strategy
from lightning_rlhf.train import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
    pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all targets"),
]
IDS = torch.tensor([list(b"Good day, sir"), list(b"what a story!")])
MASK = torch.ones_like(IDS)
TEXTS = ("hello there", "good day", "how are you", "fine, thanks", "so so", "well!")
LORA = {"full": {}, "lora": dict(lora_r=2, lora_alpha=8)}
FAST = dict(learning_rate=0.05, lr_scheduler="constant")
STORES = ("file", "folder")


def length(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    return [len(response) - 3 * response.count("e") for response in responses]


def sft(base: Path, **options) -> tuple:
    return SFTModule(str(base / "lm"), **FAST, **options), SFTDataModule(texts(), batch_size=3)


def sft_last_layer(base: Path, **options) -> tuple:
    return sft(base, **(options | dict(lora_r=2, lora_last_layers=1)))


def sft_tied(base: Path, **options) -> tuple:
    return SFTModule(str(base / "tied"), **FAST, **options), SFTDataModule(texts(), batch_size=3)


def ppo(base: Path, **options) -> tuple:
    sizes = dict(rollout_batch_size=6, minibatch_size=3, num_passes=1, max_new_tokens=4)
    module = PPOModule(str(base / "lm"), options.pop("reward", length), **sizes, **FAST, **options)
    return module, PromptDataModule(Dataset.from_dict({"prompt": TEXTS}))


def ppo_value_model(base: Path, **options) -> tuple:
    return ppo(base, reward=str(base / "judge"), value_model=str(base / "judge"), **options)


def reward(base: Path, **options) -> tuple:
    rows = [{"prompt": "q", "chosen": a, "rejected": b} for a, b in zip(TEXTS, reversed(TEXTS), strict=True)]
    data = Dataset.from_list(rows)
    return RewardModule(str(base / "lm"), **FAST, **options), PreferenceDataModule(data, val_data=data, batch_size=3)


def texts() -> Dataset:
    return Dataset.from_dict({"text": TEXTS})


KINDS = {"sft": sft, "ppo": ppo, "ppo_value_model": ppo_value_model, "reward": reward}
OTHERS = {"sft_last_layer": sft_last_layer, "sft_tied": sft_tied}


def make_base(base: Path) -> Path:
    """A language model in `lm`, one with tied embeddings in `tied`, a reward model in `judge`."""
    make_llama().save_pretrained(base / "lm")
    make_llama(tie_word_embeddings=True).save_pretrained(base / "tied")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        Scorer.load(str(base / "lm"), "float32").save_pretrained(base / "judge")
    for name in ("lm", "tied", "judge"):
        make_tokenizer().save_pretrained(base / name)
    return base


@torch.no_grad()
def outputs(network: torch.nn.Module) -> Tensor:
    """Log-probs (2, L, V) of a language model; of a scorer normalised and raw scores (2, 2)."""
    if isinstance(network, Scorer):
        return torch.stack([network(IDS, MASK), network.raw(IDS, MASK)])
    return network(input_ids=IDS).logits.log_softmax(-1)


class AtTheEnd(L.Callback):
    """While the module lives: what it computes, its checkpoint and its own exports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.outputs = outputs(pl_module.trained_network)
        trainer.save_checkpoint(self.folder / "last.ckpt")
        pl_module.save_pretrained(self.folder / "live_merged")
        if pl_module.hparams.lora_r:
            pl_module.save_pretrained(self.folder / "live_adapter", merge=False)


class Trained(NamedTuple):
    checkpoint: str
    outputs: Tensor
    folder: Path


def train(base: Path, folder: Path, kind: str, lora: str = "full", store: str = "file", **options) -> Trained:
    """A short training."""
    L.seed_everything(2, verbose=False)
    module, data = (KINDS | OTHERS)[kind](base, **LORA[lora])
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    strategy = FSDP2Strategy(save_distributed_checkpoint=True) if store == "folder" else "auto"
    end = AtTheEnd(folder)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        strategy=strategy,
        callbacks=[end],
        log_every_n_steps=1,
        **(dict(devices=1) | quiet | options),
    )
    with mock.patch.dict(os.environ):  # where Lightning leaves the port of the process group
        trainer.fit(module, data)
    if dist.is_initialized():
        dist.destroy_process_group()
    return Trained(str(folder / "last.ckpt"), end.outputs, folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Trains each once."""

    @cache
    def once(kind: str, lora: str, store: str = "file") -> Trained:
        if kind != "ppo_value_model":
            return train(base, tmp_path_factory.mktemp(kind), kind, lora, store)
        own = make_base(tmp_path_factory.mktemp("own"))
        done = train(own, tmp_path_factory.mktemp(kind), kind, lora, store)
        shutil.rmtree(own / "judge")  # an export needs neither reward nor value model
        return done

    return once


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def assert_loads(folder: Path, kind: str, expected: Tensor, adapter: bool = False) -> None:
    """By our own loaders, by transformers, and an adapter by peft."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab")["input_ids"] == [97, 98]
    if kind != "reward":
        loaders = [AutoModelForCausalLM, *([AutoPeftModelForCausalLM] if adapter else [])]
        for network in (load_causal_lm(str(folder), "float32"), *(x.from_pretrained(folder) for x in loaders)):
            assert_same(outputs(network.eval()), expected)
        return
    assert_same(outputs(Scorer.load(str(folder), "float32")), expected)
    loaders = [AutoModelForSequenceClassification, *([AutoPeftModelForSequenceClassification] if adapter else [])]
    for loader in loaders:
        with torch.no_grad():
            raw = loader.from_pretrained(folder, num_labels=1)(IDS).logits.squeeze(1)
        assert_same(raw, expected[1])
    texts = [bytes(row.tolist()).decode() for row in IDS]
    with_eos = torch.cat([IDS, torch.zeros(2, 1, dtype=torch.long)], dim=1)
    scores = ModelReward(str(folder))(Responses(texts, ["", ""]))
    assert_same(scores, Scorer.load(str(folder), "float32")(with_eos, torch.ones_like(with_eos)).detach())


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("kind", KINDS)
class TestEveryCheckpoint:
    def test_gives_the_whole_model(self, kind, lora, store, trained, tmp_path):
        done = trained(kind, lora, store)
        assert Path(done.checkpoint).is_dir() == (store == "folder")
        export(done.checkpoint, str(tmp_path / "model"))
        assert_loads(tmp_path / "model", kind, done.outputs)
        assert not list(tmp_path.rglob("adapter*"))

    def test_gives_the_adapter(self, kind, lora, store, trained, tmp_path):
        done = trained(kind, lora, store)
        if lora == "full":
            with pytest.raises(ValueError, match="--lora adapter`: the checkpoint holds all weights and no adapter"):
                export(done.checkpoint, str(tmp_path / "adapter"), lora="adapter")
            assert not list(tmp_path.iterdir())
            return
        export(done.checkpoint, str(tmp_path / "adapter"), lora="adapter")
        assert_loads(tmp_path / "adapter", kind, done.outputs, adapter=True)
        assert not list(tmp_path.rglob("model*"))
        assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_size < 30_000

    def test_gives_what_the_live_module_gave(self, kind, lora, store, trained):
        done = trained(kind, lora, store)
        assert_loads(done.folder / "live_merged", kind, done.outputs)
        if lora != "full":
            assert_loads(done.folder / "live_adapter", kind, done.outputs, adapter=True)


@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_training_moved_further_than_the_tolerance(kind, lora, trained, base):
    """Or the base model would pass for the trained one."""
    done = trained(kind, lora)
    if kind == "reward":
        assert (done.outputs[0] - done.outputs[1]).abs().max() > 0.1  # the normaliser does something
        start = outputs(Scorer.load(str(base / "judge"), "float32"))
    else:
        start = outputs(load_causal_lm(str(base / ("tied" if kind == "sft_tied" else "lm")), "float32"))
    assert (done.outputs - start).abs().max() > 0.1


def test_adapters_in_the_last_layers_only(trained, tmp_path):
    done = trained("sft_last_layer", "lora")
    export(done.checkpoint, str(tmp_path / "adapter"), lora="adapter")
    assert_loads(tmp_path / "adapter", "sft", done.outputs, adapter=True)


@pytest.mark.parametrize("store", STORES)
def test_tied_weights_stay_tied(store, trained, tmp_path):
    done = trained("sft_tied", "full", store)
    export(done.checkpoint, str(tmp_path / "model"))
    assert_loads(tmp_path / "model", "sft", done.outputs)
    with safe_open(tmp_path / "model/model.safetensors", "pt") as tensors:
        assert "lm_head.weight" not in tensors.keys()  # noqa: SIM118, no dictionary


def test_weights_keep_the_dtype_in_which_they_were_trained(base, tmp_path):
    done = train(base, tmp_path, "sft", precision="bf16-true")
    export(done.checkpoint, str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(outputs(model), done.outputs)


def test_adapters_of_bfloat16_models(base, tmp_path):
    done = train(base, tmp_path, "sft", "lora", precision="bf16-true")
    export(done.checkpoint, str(tmp_path / "adapter"), lora="adapter")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    assert torch.equal(outputs(model), done.outputs)
    export(done.checkpoint, str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(outputs(model), done.outputs, rtol=0.05, atol=0.1)  # merging rounds each weight


def test_optimizer_states_of_a_folder_are_not_read(trained):
    checkpoint = read_checkpoint(Path(trained("sft", "full", "folder").checkpoint))
    assert checkpoint["optimizer_states"][0]["state"] == {}
    assert len(checkpoint["state_dict"]) > 10


# --- what follows an adapter ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def adapters(trained, tmp_path_factory) -> dict[str, str]:
    """Folders of adapters by the kind of module."""
    folder = tmp_path_factory.mktemp("adapters")
    for kind in ("sft", "reward"):
        export(trained(kind, "lora").checkpoint, str(folder / kind), lora="adapter")
    return {kind: str(folder / kind) for kind in ("sft", "reward")}


@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
def test_training_starts_from_an_adapter_as_from_a_model(options, adapters, trained):
    policy = PPOModule(adapters["sft"], value_model=adapters["reward"], **options)
    policy.configure_model()
    assert_same(outputs(policy.policy), trained("sft", "lora").outputs)
    assert_same(outputs(policy.value), trained("reward", "lora").outputs)
    assert bool(options) != all(p.requires_grad for p in policy.policy.parameters())
    with policy.reference() as reference:
        assert_same(outputs(reference), trained("sft", "lora").outputs)
    judge = RewardModule(adapters["reward"], **options)
    judge.configure_model()
    assert_same(outputs(judge.network), trained("reward", "lora").outputs)


def test_a_reward_model_starts_from_a_language_models_adapter(adapters, trained):
    scorer = RewardModule(adapters["sft"])
    scorer.configure_model()
    found = scorer.network.model.model(IDS).last_hidden_state
    assert_same(found, load_causal_lm(adapters["sft"], "float32").model(IDS).last_hidden_state)
    assert (scorer.network.mean, scorer.network.std) == (0.0, 1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_loaded_in_the_dtype_asked_for(dtype, adapters):
    assert {p.dtype for p in load_causal_lm(adapters["sft"], dtype).parameters()} == {getattr(torch, dtype)}
    scorer = Scorer.load(adapters["reward"], dtype)
    assert {p.dtype for p in scorer.model.model.parameters()} == {getattr(torch, dtype)}
    assert scorer.head.weight.dtype == torch.float32


def test_a_skeleton_knows_the_normaliser(adapters):
    with torch.device("meta"):
        skeleton = Scorer.load(adapters["reward"], "float32")
        assert load_causal_lm(adapters["sft"], "float32").device.type == "meta"
    whole = Scorer.load(adapters["reward"], "float32")
    assert (skeleton.mean, skeleton.std) == (whole.mean, whole.std) != (0.0, 1.0)
    assert skeleton.head.weight.device.type == "meta"


def test_an_adapter_of_an_adapter_is_refused(adapters, tmp_path):
    module = SFTModule(adapters["sft"], lora_r=2)
    module.configure_model()
    with pytest.raises(ValueError, match=r"itself an adapter.*Write the merged model"):
        module.save_pretrained(tmp_path / "adapter", merge=False)
    module.save_pretrained(tmp_path / "model")
    assert_same(outputs(load_causal_lm(str(tmp_path / "model"), "float32")), outputs(module.trained_network))


def test_an_adapter_names_the_real_place_of_its_base(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(base / "lm")
    module = SFTModule("link", lora_r=2)
    module.configure_model()
    module.save_pretrained("adapter", merge=False)
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((base / "lm").resolve())
    with pytest.raises(ValueError, match="its base model is there"):
        module.save_pretrained("link", merge=False)


def test_an_adapter_whose_base_is_gone(adapters, tmp_path):
    shutil.copytree(adapters["sft"], tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match=r"adapter` is an adapter, but its base model is not at `.*/gone`"):
        load_causal_lm(str(tmp_path / "adapter"), "float32")


def test_there_is_no_adapter_without_lora(base, tmp_path):
    module = SFTModule(str(base / "lm"))
    with pytest.raises(ValueError, match="`merge` must be True"):
        module.save_pretrained(tmp_path, merge=False)


def test_one_kind_of_folder_takes_the_place_of_the_other(base, tmp_path):
    module = SFTModule(str(base / "lm"), lora_r=2)
    module.configure_model()
    (tmp_path / "notes.txt").write_text("mine")
    for merge, kept in ((True, "model.safetensors"), (False, "adapter_model.safetensors"), (True, "model.safetensors")):
        module.save_pretrained(tmp_path, merge=merge)
        assert [file.name for file in tmp_path.glob("*.safetensors")] == [kept]
        assert (tmp_path / "config.json").exists() == merge
        assert (tmp_path / "adapter_config.json").exists() != merge
    assert (tmp_path / "notes.txt").read_text() == "mine"


# --- bad input --------------------------------------------------------------------------------------------------------


class OwnModule(SFTModule):
    """A user's."""


@pytest.fixture
def checkpoint(trained) -> str:
    return trained("sft", "full").checkpoint


def changed(checkpoint: str, path: Path, **changes: object) -> str:
    """A copy of a checkpoint in which something is different."""
    torch.save(torch.load(checkpoint, weights_only=True) | changes, path)
    return str(path)


def with_hyperparameters(checkpoint: str, path: Path, **changes: object) -> str:
    """A copy in which hyperparameters are different; None leaves one out."""
    given = torch.load(checkpoint, weights_only=True)["hyper_parameters"] | changes
    kept = {name: value for name, value in given.items() if value is not None or name not in changes}
    return changed(checkpoint, path, hyper_parameters=kept)


class TestRefused:
    def refused(self, said: str, checkpoint: object, folder: Path, **options) -> None:
        before = sorted(folder.parent.rglob("*"))
        with pytest.raises(ValueError, match=said):
            export(str(checkpoint), str(folder), **options)
        assert sorted(folder.parent.rglob("*")) == before  # nothing is left half written

    def test_no_such_file(self, tmp_path):
        self.refused("no checkpoint `nowhere.ckpt`", "nowhere.ckpt", tmp_path / "model")

    def test_a_folder_that_is_none(self, tmp_path, base):
        self.refused("lm` is not a checkpoint: .*without a `meta.pt`", base / "lm", tmp_path / "model")

    @pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\3\4 and no more"])
    def test_a_file_that_is_none(self, content, tmp_path):
        (tmp_path / "bad.ckpt").write_bytes(content)
        self.refused("bad.ckpt` cannot be read", tmp_path / "bad.ckpt", tmp_path / "model")

    def test_half_a_file(self, checkpoint, tmp_path):
        content = Path(checkpoint).read_bytes()
        (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
        self.refused("half.ckpt` cannot be read", tmp_path / "half.ckpt", tmp_path / "model")

    def test_a_base_model_that_is_gone(self, checkpoint, tmp_path, trained, base):
        moved = with_hyperparameters(checkpoint, tmp_path / "moved.ckpt", model=str(tmp_path / "gone"))
        self.refused("gone` is not a model that can be loaded.*where with `--model`", moved, tmp_path / "model")
        export(moved, str(tmp_path / "model"), model=str(base / "lm"))
        assert_loads(tmp_path / "model", "sft", trained("sft", "full").outputs)

    def test_a_base_model_that_was_an_object(self, checkpoint, tmp_path, trained, base):
        unnamed = with_hyperparameters(checkpoint, tmp_path / "unnamed.ckpt", model=None)
        self.refused("`--model`: .*given as an object", unnamed, tmp_path / "model")
        export(unnamed, str(tmp_path / "model"), model=str(base / "lm"))
        assert_loads(tmp_path / "model", "sft", trained("sft", "full").outputs)

    def test_a_tokenizer_that_is_gone(self, checkpoint, tmp_path, base):
        moved = with_hyperparameters(checkpoint, tmp_path / "moved.ckpt", tokenizer=str(tmp_path / "gone"))
        self.refused("tokenizer of the checkpoint.*where with `--tokenizer`", moved, tmp_path / "model")
        export(moved, str(tmp_path / "model"), tokenizer=str(base / "judge"))
        assert AutoTokenizer.from_pretrained(tmp_path / "model")("ab")["input_ids"] == [97, 98]

    def test_another_base_model(self, checkpoint, tmp_path):
        make_llama(num_hidden_layers=1).save_pretrained(tmp_path / "small")
        make_tokenizer().save_pretrained(tmp_path / "small")
        said = "does not fit the model `.*small`: 9 tensors .*layers.1.*`--model`"
        self.refused(said, checkpoint, tmp_path / "model", model=str(tmp_path / "small"))

    def test_a_tensor_that_is_missing(self, checkpoint, tmp_path):
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        del state["network.model.norm.weight"]
        broken = changed(checkpoint, tmp_path / "broken.ckpt", state_dict=state)
        self.refused("1 tensors .*such as `network.model.norm.weight`", broken, tmp_path / "model")

    def test_of_another_library(self, checkpoint, tmp_path):
        torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
        self.refused("written by another library", tmp_path / "foreign.ckpt", tmp_path / "model")

    def test_of_a_users_own_module(self, checkpoint, tmp_path, trained):
        own = changed(checkpoint, tmp_path / "own.ckpt", module_class="OwnModule")
        self.refused(r"written by OwnModule; .*`OwnModule.load_from_checkpoint\(", own, tmp_path / "model")
        OwnModule.load_from_checkpoint(own, weights_only=True).save_pretrained(tmp_path / "model")  # as the error says
        assert_loads(tmp_path / "model", "sft", trained("sft", "full").outputs)

    def test_a_word_that_is_no_choice(self, checkpoint, tmp_path):
        self.refused(
            "`lora` must be `merged` or `adapter`, but got 'both'", checkpoint, tmp_path / "model", lora="both"
        )

    def test_a_folder_that_is_a_file(self, checkpoint, tmp_path):
        (tmp_path / "model").write_text("")
        self.refused("is a file", checkpoint, tmp_path / "model", overwrite=True)

    def test_the_base_models_own_folder(self, checkpoint, base):
        self.refused("the base model itself", checkpoint, base / "lm", overwrite=True)

    def test_a_disk_that_is_full(self, checkpoint, tmp_path, monkeypatch):
        def fail(*_: object) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
        (tmp_path / "model").mkdir()
        (tmp_path / "model/config.json").write_text("{}")
        with pytest.raises(OSError, match="no space left"):
            export(checkpoint, str(tmp_path / "model"), overwrite=True)
        assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]


def test_a_model_is_replaced_only_if_told_to(trained, tmp_path):
    folder = tmp_path / "new/model"
    export(trained("sft", "lora").checkpoint, str(folder), lora="adapter")
    (folder / "notes.txt").write_text("mine")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match=r"model` is not empty.*`--overwrite true`"):
        export(trained("reward", "full").checkpoint, str(folder))
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    export(trained("reward", "full").checkpoint, str(folder), overwrite=True)
    assert_loads(folder, "reward", trained("reward", "full").outputs)
    assert not (folder / "adapter_config.json").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


# --- the model card and the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def pushed(monkeypatch):
    """What was pushed."""
    pushed = []
    monkeypatch.setattr("lightning_rlhf.export.check_push", lambda repo: None)
    monkeypatch.setattr("lightning_rlhf.export.push", lambda *given: pushed.append(given))
    return pushed


def test_the_card_tells_what_the_checkpoint_and_its_run_know(trained, tmp_path):
    done = trained("ppo", "lora")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    measured = {"metrics": {"val/reward": 2.5}, "before": {"val/reward": 1.0}}
    path = changed(done.checkpoint, run / "checkpoints/last.ckpt", measured=measured)
    (run / "run.json").write_text(json.dumps({"command": "python train.py fit", "seed": 5, "data": None}))
    (run / "config.yaml").write_text("a: 1\n")
    export(path, str(tmp_path / "model"), lora="adapter", license="mit")
    text = (tmp_path / "model/README.md").read_text()
    for said in (
        "# model\n\nA language model trained by PPO from `lm`",
        "at optimizer step 4.",
        "| val/reward | 1 | 2.5 |",
        "| lora_r | 2 |",
        "| minibatch_size | 3 |",
        "python train.py fit\n",
        "a: 1\n",
        "Seed 5,",
        "AutoPeftModelForCausalLM",
    ):
        assert said in text
    assert ModelCard(text).data.license == "mit"


def test_without_its_run_a_checkpoint_still_gets_a_card(trained, tmp_path):
    export(trained("reward", "full").checkpoint, str(tmp_path / "model"))
    text = (tmp_path / "model/README.md").read_text()
    assert "# model\n\nA reward model trained by reward modelling from `lm`" in text
    assert text.count("Not recorded.") == 2
    assert ModelCard(text).data.license == "unknown"


def test_somebody_elses_card_stays(trained, tmp_path):
    folder = tmp_path / "model"
    export(trained("sft", "full").checkpoint, str(folder))
    assert "`lm`" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    export(trained("sft", "full").checkpoint, str(folder), overwrite=True)
    assert (folder / "README.md").read_text() == "mine"


@pytest.mark.parametrize("private", [True, False])
def test_a_folder_is_pushed_when_it_is_whole(private, trained, tmp_path, pushed):
    export(trained("sft", "full").checkpoint, str(tmp_path / "model"), push_to_hub="me/fine", private=private)
    assert pushed == [(str(tmp_path / "model"), "me/fine", private)]
    assert "# fine\n" in (tmp_path / "model/README.md").read_text()
    assert not [file for file in (tmp_path / "model").iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]


def test_nothing_is_pushed_unless_asked_for(trained, tmp_path, pushed):
    export(trained("sft", "full").checkpoint, str(tmp_path / "model"))
    assert pushed == []


def test_a_push_that_cannot_succeed_is_refused_at_once(trained, tmp_path):
    with pytest.raises(ValueError, match="`push_to_hub` must be `name` or `owner/name`"):
        export(trained("sft", "full").checkpoint, str(tmp_path / "model"), push_to_hub="a b")
    assert not (tmp_path / "model").exists()


# --- the command line -------------------------------------------------------------------------------------------------


def test_help_names_it(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])  # Lightning warns if there are others beside those of `main`
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "export              Write a checkpoint's model as a Hugging Face folder" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "only the adapter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--ckpt_path=x"], "required: folder"), (["--ckpt_path=x", "--folder=y", "--lra=adapter"], "mean --lora?")],
)
def test_bad_flags_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["export", *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_the_command(trained, tmp_path):
    done = trained("ppo", "lora", "folder")
    command = [sys.executable, str(Path(__file__).parents[1] / "train.py"), "export", f"--ckpt_path={done.checkpoint}"]
    command += ["--folder=adapter", "--lora=adapter"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert "The model is in adapter" in told.stdout + told.stderr
    assert_loads(tmp_path / "adapter", "ppo", done.outputs, adapter=True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]  # no run, no W&B


# --- two ranks --------------------------------------------------------------------------------------------------------


def test_two_ranks_write_one_adapter_and_a_folder_for_export(tmp_path):
    make_base(tmp_path / "base")
    commands, environments = zip(*ranks([sys.executable, __file__, str(tmp_path)]), strict=True)
    run_together(*commands, log_folder=tmp_path / "logs", environments=environments)
    expected = torch.load(tmp_path / "outputs.pt")
    export(str(tmp_path / "last.ckpt"), str(tmp_path / "model"))
    for folder in ("model", "live_merged"):
        assert_loads(tmp_path / folder, "reward", expected)
    assert_loads(tmp_path / "live_adapter", "reward", expected, adapter=True)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    torch.save(train(root / "base", root, "reward", "lora", "folder", devices=2).outputs, root / "outputs.pt")
