"""What is exported, when, and what the card beside it says."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from huggingface_hub import ModelCard
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file

from lightning_rlhf.callbacks import HuggingFaceExport
from lightning_rlhf.callbacks.checkpoint import RunCheckpoint
from lightning_rlhf.callbacks.controllers import EMAWeights
from lightning_rlhf.callbacks.provenance import Provenance
from lightning_rlhf.datamodules import PromptDataModule
from lightning_rlhf.hub import PushError
from lightning_rlhf.modules import PPOModule


def test_model_is_saved_once_when_fit_has_ended(fit, tmp_path):
    module, _ = fit([HuggingFaceExport(dirname="policy")])
    assert module.exported == [str(tmp_path / "policy")]


def test_nothing_is_saved_when_fit_fails(fit):
    module = fit([], max_epochs=1)[0]

    def fail(*_):
        raise RuntimeError("out of luck")

    module.training_step = fail
    with pytest.raises(RuntimeError, match="out of luck"):
        fit([HuggingFaceExport()], module=module)
    assert module.exported == []


@pytest.fixture
def module(fit):
    """Untrained; remembers with which arguments it was saved."""
    module = fit([], max_epochs=0)[0]
    module.save_pretrained = lambda *given, **options: module.exported.append((*given, options))
    return module


@pytest.mark.parametrize(("lora", "options"), [("merged", {}), ("adapter", {"merge": False})])
def test_an_adapter_is_saved_if_asked_for(lora, options, fit, tmp_path, module):
    module.save_hyperparameters({"lora_r": 4})
    fit([HuggingFaceExport(lora=lora)], module=module)
    assert module.exported == [(tmp_path / "model", options)]


@pytest.mark.parametrize("hyperparameters", [{}, {"lora_r": 0}], ids=str)
def test_without_lora_an_adapter_is_refused_before_training(hyperparameters, fit, module):
    module.save_hyperparameters(hyperparameters)
    with pytest.raises(ValueError, match="`lora_r` is 0"):
        fit([HuggingFaceExport(lora="adapter")], module=module)
    assert module.trace == module.exported == []


def test_with_4_bits_only_the_adapter_is_written(fit, module):
    module.save_hyperparameters({"lora_r": 4, "load_in_4bit": True})
    with pytest.raises(ValueError, match=r"`HuggingFaceExport\(lora=merged\)`: with `load_in_4bit`.*`lora: adapter`"):
        fit([HuggingFaceExport()], module=module)
    assert module.trace == module.exported == []
    fit([HuggingFaceExport(lora="adapter")], module=module)
    assert len(module.exported) == 1


# --- the best model ---------------------------------------------------------------------------------------------------

BEST = dict(monitor="val/score", mode="max")


def save(module, folder: Path) -> None:
    """What stands for `save_pretrained`: the weights as they are now; noise is drawn, as building a model does."""
    torch.rand(3)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.json").write_text(json.dumps(module.linear.weight.tolist()))
    module.exported.append(folder.name)


def weights(folder: Path) -> list:
    return json.loads((folder / "weights.json").read_text())


def weights_in(checkpoint: str | Path) -> list:
    return torch.load(checkpoint, weights_only=True)["state_dict"]["linear.weight"].tolist()


@pytest.fixture
def scored(fit, tmp_path):
    """Fits a module whose `val/score` after each epoch (or validation) is given; returns it and its ModelCheckpoint."""

    def run(scores, export=(), callbacks=(), keeper=None, ckpt_path=None, fails=None, **options):
        keeper = keeper or RunCheckpoint(
            tmp_path / "kept", "{epoch}", save_last=True, save_on_train_epoch_end=True, **BEST
        )
        module, _ = fit([], max_epochs=0)
        step, left = module.validation_step, list(scores)

        def validation_step(batch, batch_idx):
            if batch_idx == 0 and not module.trainer.sanity_checking:
                module.score = left.pop(0)
            module.log("val/score", getattr(module, "score", -1.0), batch_size=1)
            return step(batch, batch_idx)

        module.validation_step = validation_step
        module.save_pretrained = lambda folder, **_: save(module, Path(folder))
        settings = dict(max_epochs=len(scores), enable_checkpointing=True) | options
        callbacks = [*callbacks, HuggingFaceExport(**dict(export)), keeper]
        if fails is None:
            fit(callbacks, module=module, ckpt_path=ckpt_path, **settings)
        else:
            with pytest.raises(RuntimeError, match=fails):
                fit(callbacks, module=module, ckpt_path=ckpt_path, **settings)
        return module, keeper

    return run


class Fail(L.Callback):
    """Fails at the start of an epoch, before other callbacks."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("killed")


@pytest.mark.parametrize(("scores", "best"), [([0.1, 0.5, 0.2], 1), ([0.1, 0.2, 0.5], 2), ([0.5, 0.5, 0.5], 0)])
def test_best_holds_the_model_of_the_best_checkpoint(scores, best, scored, tmp_path):
    module, keeper = scored(scores)
    assert Path(keeper.best_model_path).name == f"epoch={best}.ckpt"
    assert weights(tmp_path / "best") == weights_in(keeper.best_model_path)
    assert weights(tmp_path / "model") == module.linear.weight.tolist()
    assert (weights(tmp_path / "best") == weights(tmp_path / "model")) == (best == 2)
    assert not list(tmp_path.glob(".best*"))


def test_a_new_best_is_exported_at_once(scored, tmp_path):
    module, _ = scored([0.1, 0.2, 0.5, 0.3], callbacks=[Fail(3)], fails="killed")
    assert module.exported == [".best.partial"] * 2  # of epochs 0 and 1; that of 2 would come now
    assert (tmp_path / "best").exists()
    assert not (tmp_path / "model").exists()


def test_the_best_within_an_epoch(scored, tmp_path):
    keeper = ModelCheckpoint(tmp_path / "kept", "{step}", save_on_train_epoch_end=False, **BEST)
    scored([0.1, 0.5, 0.2, 0.3], keeper=keeper, max_epochs=2, val_check_interval=2)
    assert Path(keeper.best_model_path).name == "step=4.ckpt"
    assert weights(tmp_path / "best") == weights_in(keeper.best_model_path)


@pytest.mark.parametrize("case", ["switched off", "no monitor"])
def test_there_is_no_best(case, scored, tmp_path):
    if case == "switched off":
        module, _ = scored([0.1, 0.5, 0.2], export=dict(best=False))
    else:
        module, _ = scored([0.1, 0.5, 0.2], keeper=ModelCheckpoint(tmp_path / "kept"))
    assert module.exported == ["model"]
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("scores", [[0.1, 0.5, 0.2], [0.1, 0.5]], ids=["in the middle", "at the end"])
@pytest.mark.parametrize("kind", [EMAWeightAveraging, EMAWeights])
def test_best_holds_averaged_weights_as_the_checkpoint_does(kind, scores, scored, tmp_path):
    module, keeper = scored(scores, callbacks=[kind(decay=0.5)])
    best = torch.load(keeper.best_model_path, weights_only=True)
    assert weights(tmp_path / "best") == weights_in(keeper.best_model_path)
    current = best["ema"]["trained"] if kind is EMAWeights else best["current_model_state"]
    assert weights(tmp_path / "best") != current["linear.weight"].tolist()
    assert weights(tmp_path / "model") == module.linear.weight.tolist()
    assert weights(tmp_path / "model") == weights_in(keeper.last_model_path)


def test_a_run_with_it_is_the_run_without_it(scored, tmp_path):
    with_best, _ = scored([0.1, 0.5, 0.7])
    without, _ = scored([0.1, 0.5, 0.7], export=dict(best=False), keeper=ModelCheckpoint(tmp_path / "other"))
    assert with_best.trace == without.trace
    assert torch.equal(with_best.linear.weight, without.linear.weight)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
class TestResumed:
    def test_from_the_best_checkpoint_itself(self, scored, tmp_path):
        scored([0.1, 0.5, 0.2], callbacks=[Fail(2)], fails="killed")
        before = weights(tmp_path / "best")
        module, keeper = scored([0.2], ckpt_path=tmp_path / "kept/last.ckpt", max_epochs=3)
        assert Path(keeper.best_model_path).name == "epoch=1.ckpt"
        assert weights(tmp_path / "best") == weights_in(keeper.best_model_path) != before
        assert module.exported == [".best.partial", "model"]

    def test_from_a_later_one(self, scored, tmp_path):
        scored([0.1, 0.5, 0.2])
        before = weights(tmp_path / "best")
        module, _ = scored([0.3], ckpt_path=tmp_path / "kept/last.ckpt", max_epochs=4)
        assert module.exported == ["model"]
        assert weights(tmp_path / "best") == before
        scored([0.3, 0.9], ckpt_path=tmp_path / "kept/last.ckpt", max_epochs=6)
        assert weights(tmp_path / "best") == weights_in(tmp_path / "kept/epoch=5.ckpt") != before

    @pytest.mark.parametrize("switched_off", [True, False])
    def test_from_a_run_that_did_not_export_it(self, switched_off, scored, tmp_path):
        scored([0.1, 0.5, 0.2], export=dict(best=False))
        last = tmp_path / "kept/last.ckpt"
        if not switched_off:  # there was no such callback at all
            checkpoint = torch.load(last, weights_only=True)
            del checkpoint["callbacks"]["HuggingFaceExport"]
            torch.save(checkpoint, last)
        module, _ = scored([0.3], ckpt_path=last, max_epochs=4)
        assert module.exported == ["model"]  # the weights of the best are not there to be exported

    def test_in_another_folder(self, scored, tmp_path):
        scored([0.1, 0.5, 0.2])
        keeper = RunCheckpoint(tmp_path / "elsewhere", "{epoch}", save_on_train_epoch_end=True, **BEST)
        with pytest.warns(UserWarning, match="The dirpath has changed"):
            scored([0.3], ckpt_path=tmp_path / "kept/last.ckpt", max_epochs=4, keeper=keeper)
        assert weights(tmp_path / "best") == weights_in(tmp_path / "elsewhere/epoch=3.ckpt")


# --- the card ---------------------------------------------------------------------------------------------------------


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_each_card_tells_of_its_own_model(scored, tmp_path):
    scored([0.1, 0.5, 0.2], callbacks=[Provenance()], export=dict(license="mit"))
    assert "the best `val/score` (max): 0.5, at optimizer step 4." in card(tmp_path / "best")
    assert "| val/score | -1 | 0.5 |" in card(tmp_path / "best")
    assert "at the end of the training" in card(tmp_path / "model")
    assert "| val/score | -1 | 0.2 |" in card(tmp_path / "model")
    for folder in ("best", "model"):
        assert ModelCard(card(tmp_path / folder)).data.license == "mit"
        assert "Seed 1, processes: 1." in card(tmp_path / folder)  # from Provenance
        assert f"# {tmp_path.name}\n" in card(tmp_path / folder)


def test_half_a_sanity_check_measures_nothing(scored, tmp_path):
    scored([0.1, 0.5], num_sanity_val_steps=1)
    assert "| val/score | 0.5 |" in card(tmp_path / "model")


def test_metrics_of_an_earlier_model_are_left_out(scored, tmp_path):
    scored([0.1], check_val_every_n_epoch=2, max_epochs=3)
    assert "| val/score | -1 | 0.1 |" in card(tmp_path / "best")
    assert "not measured on held-out data" in card(tmp_path / "model")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_checkpoint_says_what_was_measured_of_it(scored, tmp_path):
    scored([0.1, 0.5, 0.2])
    measured = torch.load(tmp_path / "kept/epoch=1.ckpt", weights_only=True)["measured"]
    assert measured["metrics"]["val/score"] == 0.5
    assert measured["before"]["val/score"] == -1
    scored([0.3], ckpt_path=tmp_path / "kept/epoch=1.ckpt", max_epochs=3)
    assert "| val/score | -1 | 0.3 |" in card(tmp_path / "model")  # a resumed run has no sanity check


def test_the_name_of_the_best_folder_is_taken():
    with pytest.raises(ValueError, match="`dirname` must be another name than `best`"):
        HuggingFaceExport(dirname="best")


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pushed(monkeypatch):
    """What was pushed, and with which files."""
    pushed = []

    def push(folder, repo, private):
        pushed.append((folder.name, repo, private, sorted(file.name for file in folder.iterdir())))
        return "address"

    monkeypatch.setattr("lightning_rlhf.callbacks.export.push", push)
    monkeypatch.setattr("lightning_rlhf.callbacks.export.check_push", lambda repo: None)
    return pushed


FILES = ["README.md", "weights.json"]


def test_the_best_model_is_pushed_if_there_is_one(scored, pushed, tmp_path):
    scored([0.1, 0.5, 0.2], export=dict(push_to_hub="me/fine"))
    assert pushed == [("best", "me/fine", True, FILES)]
    assert "# fine\n" in card(tmp_path / "best")
    assert "folder = 'me/fine'" in card(tmp_path / "best")


def test_else_the_last_is(scored, pushed):
    scored([0.1, 0.5, 0.2], export=dict(push_to_hub="me/fine", private=False, best=False, dirname="policy"))
    assert pushed == [("policy", "me/fine", False, FILES)]


def test_nothing_is_pushed_unless_asked_for(scored, pushed):
    scored([0.1, 0.5])
    assert pushed == []


def test_a_push_that_fails_is_a_warning(scored, pushed, monkeypatch, tmp_path):
    def fail(folder, *_):
        raise PushError(f"`{folder}` was not pushed")

    monkeypatch.setattr("lightning_rlhf.callbacks.export.push", fail)
    with pytest.warns(UserWarning, match="best` was not pushed"):
        scored([0.1, 0.5], export=dict(push_to_hub="me/fine"))
    assert sorted(file.name for file in (tmp_path / "best").iterdir()) == FILES


def test_a_push_that_cannot_succeed_is_refused_before_training(fit):
    module = fit([], max_epochs=0)[0]
    with pytest.raises(ValueError, match="`push_to_hub` must be `name` or `owner/name`, but got 'a b'"):
        fit([HuggingFaceExport(push_to_hub="a b")], module=module)
    assert module.trace == []


# --- PPO, from end to end ---------------------------------------------------------------------------------------------


def vowels(prompts, responses, **columns):
    return [float(sum(response.count(letter) for letter in "aeiou")) for response in responses]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_best_of_a_ppo_run_is_exported_and_early_stopping_ends_it(tmp_path):
    make_llama().save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    prompts = Dataset.from_dict({"prompt": ["hello", "good", "how are", "fine,"]})
    sizes = dict(rollout_batch_size=8, minibatch_size=4, num_passes=2, max_new_tokens=8)
    L.seed_everything(1, verbose=False)
    module = PPOModule(str(tmp_path / "lm"), vowels, learning_rate=0.05, lr_scheduler="constant", **sizes)
    keeper = RunCheckpoint(
        tmp_path / "kept", "{epoch}", monitor="val/reward", mode="max", save_last=True, save_on_train_epoch_end=True
    )
    stopping = EarlyStopping("val/reward", mode="max", patience=2)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1)
    callbacks = [HuggingFaceExport(), stopping, keeper]
    trainer = L.Trainer(
        max_epochs=20, callbacks=callbacks, default_root_dir=tmp_path, num_sanity_val_steps=0, log_every_n_steps=1,
        **quiet,
    )  # fmt: skip
    trainer.fit(module, PromptDataModule(prompts, val_data=prompts))

    best, last = (torch.load(path, weights_only=True) for path in (keeper.best_model_path, keeper.last_model_path))
    assert stopping.stopped_epoch == last["epoch"] == best["epoch"] + 2 < 19
    assert keeper.best_model_score == stopping.best_score
    for folder, checkpoint in (("best", best), ("model", last)):
        assert not [file for file in (tmp_path / folder).iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        found = load_file(tmp_path / folder / "model.safetensors")
        saved = {name.removeprefix("policy."): x for name, x in checkpoint["state_dict"].items() if "policy." in name}
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in found)
        score = f"{checkpoint['measured']['metrics']['val/reward']:.4g}"
        assert f"| val/reward | {score} |" in card(tmp_path / folder)
    assert not torch.equal(best["state_dict"]["policy.lm_head.weight"], last["state_dict"]["policy.lm_head.weight"])
