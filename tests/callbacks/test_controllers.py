"""What steers a run: when the reference is refreshed, where the entropy bonus goes, what the averaged weights are."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

from lightning_rlhf.callbacks import HuggingFaceExport
from lightning_rlhf.callbacks.controllers import EMAWeights, EntropyTarget, ReferenceRefresh
from lightning_rlhf.modules import PreferenceModule, SFTModule
from lightning_rlhf.modules.backbone import load_causal_lm


class SaveAt(L.Callback):
    """A checkpoint behind an optimizer step."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


# --- the reference ---------------------------------------------------------------------------------------------------


class Reference:
    """Notes when it is refreshed."""

    def __init__(self):
        self.refreshed, self.refreshes = [], 0

    def check(self, weight):
        pass

    def refresh(self, weight):
        self.refreshed.append(weight)
        self.refreshes += 1


class Model(L.LightningModule):
    """One weight w with the loss w · x for x = 1, 2, 3, ...; SGD. Remembers when its reference was refreshed."""

    def __init__(self, entropy=None, mask=None, entropy_coef=0.0, lr=1.0):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.frozen = torch.nn.Parameter(torch.full((2,), 7.0), requires_grad=False)
        self.lr, self.reference, self.times, self.seen, self.coefs = lr, Reference(), [], [], []
        self.entropies, self.mask, self.entropy_coef = entropy, mask, entropy_coef

    def on_train_epoch_start(self):
        if self.entropies:
            self.per_token = {"entropy": torch.tensor(self.entropies[self.current_epoch]), "mask": self.mask}

    def training_step(self, batch, batch_idx):
        self.times.append((self.current_epoch, self.global_step, self.reference.refreshes))
        self.coefs.append(self.entropy_coef)
        return self.w * batch

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.w.item())

    def sum_over_ranks(self, values):
        return values

    def configure_optimizers(self):
        return torch.optim.SGD([self.w], lr=self.lr)


def train(module, callbacks, make_trainer, batches=(1.0, 2.0, 3.0), ckpt_path=None, **options):
    trainer = make_trainer(callbacks=callbacks, **({"max_epochs": 1} | options))
    loader = DataLoader(torch.tensor(batches), batch_size=None)
    trainer.fit(module, loader, DataLoader([0.0], batch_size=None), ckpt_path=ckpt_path, weights_only=True)
    return module


def test_refreshes_every_so_many_epochs(make_trainer):
    module = train(Model(), [ReferenceRefresh(2, weight=0.3)], make_trainer, [1.0], max_epochs=5)
    assert [refreshes for *_, refreshes in module.times] == [0, 0, 1, 1, 2]
    assert module.reference.refreshed == [0.3, 0.3]


@pytest.mark.parametrize(
    ("accumulate", "expected"), [(1, [0, 0, 1, 1, 2, 2]), (2, [0, 0, 0, 0, 1, 1])], ids=["each batch", "every second"]
)
def test_refreshes_every_so_many_optimizer_steps(make_trainer, accumulate, expected):
    callbacks = [ReferenceRefresh(every_n_steps=2)]
    module = train(Model(), callbacks, make_trainer, [1.0] * 6, accumulate_grad_batches=accumulate)
    assert [refreshes for *_, refreshes in module.times] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`every_n_epochs` or `every_n_steps` must be given, and not both, but got None and None"),
        ({"every_n_epochs": 1, "every_n_steps": 1}, "and not both, but got 1 and 1"),
        ({"every_n_epochs": 0}, "`every_n_epochs` must be at least 1, but got 0"),
        ({"every_n_steps": -1}, "`every_n_steps` must be at least 1, but got -1"),
        ({"every_n_epochs": 1, "weight": 0.0}, "`weight` must be above 0 and at most 1, but got 0.0"),
    ],
)
def test_a_refresh_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReferenceRefresh(**arguments)


def test_a_module_without_a_reference_is_refused(make_trainer):
    module = Model()
    module.reference = None
    with pytest.raises(ValueError, match="needs a module with a reference, but this Model has none"):
        train(module, [ReferenceRefresh(1)], make_trainer)


def test_a_cache_of_what_the_reference_says_is_refused(make_trainer, tiny_model, tmp_path):
    module = PreferenceModule(tiny_model, reference_cache=str(tmp_path))
    with pytest.raises(ValueError, match="`reference_cache` keeps what one reference says"):
        train(module, [ReferenceRefresh(1)], make_trainer)


# --- the entropy -----------------------------------------------------------------------------------------------------

MASK = torch.tensor([[True, True], [True, False]])
LOW, HIGH = [[0.5, 1.0], [0.0, 9.0]], [[3.0, 2.0], [4.0, 0.0]]  # means over the mask: 0.5 and 3


def coefs(make_trainer, controller, entropy, start=0.0):
    module = Model(entropy, MASK, start)
    return train(module, [controller], make_trainer, [1.0, 1.0], max_epochs=len(entropy)).coefs


def test_the_entropy_bonus_grows_below_the_target_and_shrinks_above(make_trainer):
    found = coefs(make_trainer, EntropyTarget(2.0, step_size=0.01), [LOW, LOW, HIGH, HIGH], start=0.02)
    # 0.02 + 0.01 (2 − 0.5) = 0.035; 0.05; then 0.01 (2 − 3) less each time. Two batches an iteration.
    assert found == pytest.approx([0.035, 0.035, 0.05, 0.05, 0.04, 0.04, 0.03, 0.03])


def test_the_entropy_bonus_is_never_negative_nor_above_its_largest_value(make_trainer):
    found = coefs(make_trainer, EntropyTarget(2.0, step_size=0.1, max_coef=0.2), [HIGH, LOW, LOW], start=0.05)
    assert found == pytest.approx([0.0, 0.0, 0.15, 0.15, 0.2, 0.2])


def test_a_module_without_an_entropy_bonus_is_refused(make_trainer):
    module = Model()
    del module.entropy_coef
    with pytest.raises(ValueError, match="needs PPO or GRPO, which have an entropy bonus, not Model"):
        train(module, [EntropyTarget(1.0)], make_trainer)


@pytest.mark.parametrize("name", ["target", "step_size", "max_coef"])
def test_numbers_of_the_entropy_target_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be above 0, but got 0"):
        EntropyTarget(**({"target": 1.0} | {name: 0}))


# --- averaged weights ------------------------------------------------------------------------------------------------

# SGD with gradients 1, 2, 3: weights 0, −1, −3, −6. Halved each step: 0, −0.5, −1.75, −3.875.
AVERAGES = [0.0, -0.5, -1.75, -3.875]


def test_the_average_after_each_step(make_trainer):
    kept = EMAWeights(decay=0.5)
    for steps, average in enumerate(AVERAGES):
        train(Model(), [kept], make_trainer, [1.0, 2.0, 3.0][:steps] or [0.0])
        assert float(kept.average["w"]) == average
        assert kept.average.keys() == {"w"}


def test_accumulated_batches_are_one_step(make_trainer):
    kept = EMAWeights(decay=0.5)
    train(Model(), [kept], make_trainer, [2.0, 4.0], accumulate_grad_batches=2)
    assert float(kept.average["w"]) == -1.5  # the weight is −(2 + 4) / 2


def test_the_run_ends_with_the_average(make_trainer):
    module = train(Model(), [EMAWeights(decay=0.5)], make_trainer)
    assert module.w.item() == AVERAGES[3]
    assert module.frozen.tolist() == [7, 7]


def test_without_decay_the_average_is_the_last_weight(make_trainer):
    assert train(Model(), [EMAWeights(decay=0.0)], make_trainer).w.item() == -6


def test_validation_sees_the_average_and_training_does_not(make_trainer):
    kept = EMAWeights(decay=0.5)
    module = train(Model(), [kept], make_trainer, num_sanity_val_steps=1, val_check_interval=1)
    assert module.seen == [0.0, *AVERAGES[1:]]  # the first is the sanity check
    assert float(kept._trained["w"]) == -6


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("first", [True, False], ids=["saved before it", "saved behind it"])
def test_a_resumed_run_goes_on_from_the_weights_and_ends_with_the_same_average(make_trainer, tmp_path, step, first):
    path, kept, again = tmp_path / "at.ckpt", EMAWeights(0.5), EMAWeights(0.5)
    callbacks = [SaveAt(step, path), kept] if first else [kept, SaveAt(step, path)]
    options = {"max_epochs": 3, "val_check_interval": 1}
    whole = train(Model(), callbacks, make_trainer, [1.0], **options)
    saved = torch.load(path, weights_only=True)
    assert float(saved["ema"]["trained"]["w"]) == -step
    assert float(saved["state_dict"]["w"]) == -step + 1 - 0.5**step  # by hand: −0.5, −1.25, −2.125
    resumed = train(Model(), [again], make_trainer, [1.0], ckpt_path=path, **options)
    assert resumed.w.item() == whole.w.item() == -2.125
    assert float(again._trained["w"]) == float(kept._trained["w"]) == -3


def test_a_checkpoint_from_the_end_can_be_gone_on_from(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[EMAWeights(0.5)], max_epochs=2)
    loader = DataLoader(torch.tensor([1.0]), batch_size=None)
    trainer.fit(Model(), loader, loader)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    resumed = train(Model(), [EMAWeights(0.5)], make_trainer, [1.0], ckpt_path=tmp_path / "end.ckpt", max_epochs=3)
    assert resumed.w.item() == -2.125


def test_a_checkpoint_without_an_average_is_refused(make_trainer, tmp_path):
    train(Model(), [SaveAt(1, tmp_path / "at.ckpt")], make_trainer)
    with pytest.raises(ValueError, match="`EMAWeights`: the checkpoint holds no average"):
        train(Model(), [EMAWeights()], make_trainer, ckpt_path=tmp_path / "at.ckpt", max_epochs=2)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match="`decay` must be at least 0 and below 1, but got"):
        EMAWeights(decay)


def sft(tiny_model, tmp_path, make_trainer, callbacks, **options):
    """Three steps of fine-tuning on the same text."""
    torch.manual_seed(0)
    module = SFTModule(tiny_model, learning_rate=1e-2, lr_scheduler="constant", **options)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "loss_mask": torch.ones_like(ids).bool()}
    trainer = make_trainer(callbacks=callbacks, max_epochs=1, limit_val_batches=0)
    loader = DataLoader([batch] * 3, batch_size=None)
    trainer.fit(module, loader, loader)
    return module


@pytest.mark.parametrize("options", [{}, {"lora_r": 2}, {"dtype": "bfloat16"}], ids=["full", "lora", "bfloat16"])
def test_the_export_and_the_checkpoint_of_a_language_model_hold_the_average(
    tiny_model, tmp_path, make_trainer, options
):
    kept, path = EMAWeights(0.5), tmp_path / "at.ckpt"
    callbacks = [HuggingFaceExport(), kept, SaveAt(3, path)]
    module = sft(tiny_model, tmp_path, make_trainer, callbacks, **options)
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"].keys() == module.trained_names()
    assert kept.average.keys() == saved["ema"]["trained"].keys() <= module.trained_names()
    assert saved["ema"]["average"].keys() == (kept.average.keys() if "dtype" in options else set())
    for name, average in kept.average.items():
        assert average.dtype == torch.float32
        assert torch.equal(saved["state_dict"][name], average.to(module.get_parameter(name).dtype))
        assert torch.equal(module.get_parameter(name), saved["state_dict"][name])
        assert not torch.equal(average, saved["ema"]["trained"][name].float())
    exported = load_causal_lm(str(tmp_path / "model"), "float32")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = module.network(ids).logits.float()
        torch.testing.assert_close(exported(ids).logits, expected, rtol=0, atol=0.2 if "dtype" in options else 1e-4)


def test_averaging_changes_no_step(tiny_model, tmp_path, make_trainer):
    kept = EMAWeights(0.5)
    bare = sft(tiny_model, tmp_path, make_trainer, [])
    sft(tiny_model, tmp_path, make_trainer, [kept])
    for name, trained in kept._trained.items():
        assert torch.equal(bare.get_parameter(name), trained)


def test_lightnings_own_average_works_with_these_modules_but_keeps_what_is_frozen(tiny_model, tmp_path, make_trainer):
    lean, whole = (tmp_path / name for name in ("lean.ckpt", "whole.ckpt"))
    ours = sft(tiny_model, tmp_path, make_trainer, [EMAWeights(0.5), SaveAt(3, lean)], lora_r=2)
    with pytest.warns(UserWarning, match="WeightAveraging callback with a model that overrides the configure_model"):
        theirs = sft(tiny_model, tmp_path, make_trainer, [EMAWeightAveraging(decay=0.5), SaveAt(3, whole)], lora_r=2)
    for name in ours.trained_names():  # which begins with the weights after the first step, and not before it
        assert ours.get_parameter(name).shape == theirs.get_parameter(name).shape
    frozen = theirs.state_dict().keys() - theirs.trained_names()
    assert frozen <= torch.load(whole, weights_only=True)["current_model_state"].keys()
    assert not frozen & torch.load(lean, weights_only=True)["ema"]["trained"].keys()
