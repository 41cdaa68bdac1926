"""The optimizer, its schedule, LoRA, what is logged, and which arguments are refused."""

import math

import lightning as L
import pytest
import torch
from conftest import make_llama, make_tokenizer

from lightning_rlhf.modules import SFTModule, TextModule

RATE, STEPS = 1e-2, 10


def batch(*rows):
    """Right-padded ids; every token but the first counts."""
    width = max(map(len, rows))
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows])
    loss_mask = mask.bool()
    loss_mask[:, 0] = False
    return {"input_ids": ids, "attention_mask": mask, "loss_mask": loss_mask}


BATCH = batch([1, 2, 3, 4], [5, 6, 7])


@pytest.fixture
def sft(policy):
    def make(**options):
        return SFTModule(policy, **(dict(learning_rate=RATE, lr_scheduler="constant") | options))

    return make


@pytest.fixture
def rates(fit):
    """The learning rate of each optimizer step."""

    def run(module, **trainer):
        seen = []
        module.on_before_zero_grad = lambda optimizer: seen.append(optimizer.param_groups[0]["lr"])
        fit(module, [BATCH] * STEPS, **trainer)
        return seen

    return run


def linear(k, n, warm):
    return k / warm if k < warm else (n - k) / (n - warm)


def cosine(k, n, warm):
    return k / warm if k < warm else (1 + math.cos(math.pi * (k - warm) / (n - warm))) / 2


@pytest.mark.parametrize(
    ("name", "ratio", "shape"),
    [
        ("linear", 0.0, linear),
        ("linear", 0.3, linear),
        ("cosine", 0.0, cosine),
        ("cosine", 0.3, cosine),
        ("constant", 0.0, lambda k, n, warm: 1),
        ("constant_with_warmup", 0.3, lambda k, n, warm: min(k / warm, 1)),
    ],
)
def test_schedules_follow_their_closed_form(sft, rates, name, ratio, shape):
    seen = rates(sft(lr_scheduler=name, warmup_ratio=ratio))
    assert seen == pytest.approx([RATE * shape(k, STEPS, round(ratio * STEPS)) for k in range(STEPS)])


def test_warmup_as_a_number_of_steps(sft, rates):
    as_share = sft(lr_scheduler="cosine", warmup_ratio=3 / STEPS)
    assert rates(sft(lr_scheduler="cosine", warmup_steps=3)) == rates(as_share)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_cosine_may_end_above_zero(sft, rates, share):
    seen = rates(sft(lr_scheduler="cosine_with_min_lr", min_lr_ratio=share))
    expected = [share + (1 - share) * (1 + math.cos(math.pi * k / STEPS)) / 2 for k in range(STEPS)]
    assert seen == pytest.approx([RATE * value for value in expected])


def test_schedules_count_optimizer_steps_not_batches(sft, rates):
    seen = rates(sft(lr_scheduler="linear"), accumulate_grad_batches=2)
    assert sorted(set(seen), reverse=True) == pytest.approx([RATE * (5 - k) / 5 for k in range(5)])


def test_constant_needs_no_end_of_the_run(sft, rates):
    module = sft()
    assert rates(module, max_epochs=-1, limit_train_batches=2, max_time={"seconds": 0}) == []
    with pytest.raises(ValueError, match="`lr_scheduler=cosine` needs to know how long the run is"):
        rates(sft(lr_scheduler="cosine"), max_epochs=-1)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"adam_eps": 1e-2}, {"learning_rate": 3e-2}], ids=str)
def test_the_first_step_is_adamw_by_hand(sft, fit, gradients, options):
    module = sft(**options)
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, [BATCH], callbacks=[gradients])
    rate, decay, eps = ({"learning_rate": RATE, "weight_decay": 0.0, "adam_eps": 1e-8} | options).values()
    for name, p in module.named_parameters():
        g = gradients.steps[0][name]  # bias-corrected, both moments are those of this one gradient
        torch.testing.assert_close(p.detach(), before[name] * (1 - rate * decay) - rate * g / (g.abs() + eps))


def test_gradient_clipping_acts_on_the_mean(sft, fit, new_gradients):
    def norm(clip):
        watch = new_gradients()
        fit(sft(), [BATCH] * 2, callbacks=[watch], accumulate_grad_batches=2, gradient_clip_val=clip)
        return torch.stack([g.square().sum() for g in watch.steps[0].values()]).sum().sqrt().item()

    free = norm(None)
    assert norm(1.2 * free) == pytest.approx(free)
    assert norm(0.5 * free) == pytest.approx(free / 2, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_gradient_checkpointing_changes_no_gradient(sft, fit, new_gradients, options):
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        watch, calls = new_gradients(), []
        module = sft(gradient_checkpointing=on, **options)
        module.configure_model()
        first = next(m for n, m in module.named_modules() if n.endswith("layers.0.mlp"))
        first.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        fit(module, [BATCH], callbacks=[watch])
        found.append(watch.steps[0])
        assert len(calls) == 1 + on
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def adapted(module):
    module.configure_model()
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_lora_r_trains_adapters_of_that_rank_only(sft):
    module = sft(lora_r=3)
    names = adapted(module)
    assert len(names) == 2 * 2 * 7
    assert all("lora_" in name for name in names)
    assert {min(p.shape) for n, p in module.named_parameters() if n in names} == {3}
    assert len(adapted(sft())) == len(list(make_llama(vocab_size=8).parameters()))


def test_lora_target_modules_choose_the_layers(sft):
    assert len(adapted(sft(lora_r=2, lora_target_modules=["q_proj", "v_proj"]))) == 2 * 2 * 2
    assert all("q_proj" in n for n in adapted(sft(lora_r=2, lora_target_modules=["q_proj"])))


def test_lora_last_layers_leaves_the_first_as_they_are(sft, fit):
    for options, kinds in [({}, 7), ({"lora_target_modules": ["q_proj"]}, 1)]:
        names = adapted(sft(lora_r=2, lora_last_layers=1, **options))
        assert len(names) == 2 * kinds
        assert all(".layers.1." in name for name in names)
    assert adapted(sft(lora_r=2, lora_last_layers=2)) == adapted(sft(lora_r=2))
    for wrong in (0, 3):
        with pytest.raises(ValueError, match="`lora_last_layers` must be between 1 and the model's 2 layers"):
            sft(lora_r=2, lora_last_layers=wrong).configure_model()


def test_lora_alpha_over_r_is_the_scale(sft):
    """The adapter's part of the output, W' − W, is (alpha / r) · B A."""
    for r, alpha in [(2, 8), (4, 8), (4, 16)]:
        module = sft(lora_r=r, lora_alpha=alpha)
        module.configure_model()
        layer = module.network.base_model.model.model.layers[0].mlp.up_proj
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.nn.init.normal_(b)
        x = torch.randn(5, 32)
        torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ (b @ a).T * (alpha / r), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_dtype_is_that_of_the_backbone_and_adapters_stay_float32(sft, dtype, expected):
    module = sft(dtype=dtype, lora_r=2)
    module.configure_model()
    by_kind = {"lora" in name: p.dtype for name, p in module.named_parameters()}
    assert by_kind == {True: torch.float32, False: expected}


def test_a_model_object_needs_a_tokenizer_and_is_left_out_of_the_checkpoint(fit, tmp_path):
    with pytest.raises(ValueError, match="`tokenizer` is required when `model` is a PreTrainedModel"):
        _ = SFTModule(make_llama()).tokenizer
    module = fit(SFTModule(make_llama(), tokenizer=make_tokenizer()), [BATCH])
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not {"model", "tokenizer"} & saved["hyper_parameters"].keys()
    again = SFTModule.load_from_checkpoint(
        tmp_path / "a.ckpt", model=make_llama(seed=3), tokenizer=make_tokenizer(), weights_only=True
    )
    for name, p in module.named_parameters():
        assert torch.equal(p, again.get_parameter(name))


def test_tokenizer_is_the_models_own_or_the_one_given(policy, tmp_path):
    other = make_tokenizer()
    other.pad_token = "~"
    other.save_pretrained(tmp_path)
    assert SFTModule(policy).tokenizer.pad_token == "<eos>"
    assert SFTModule(policy, tokenizer=str(tmp_path)).tokenizer.pad_token == "~"


def test_hyperparameters_are_those_given_and_nothing_is_configured_twice(sft):
    module = sft(lora_r=2, weight_decay=0.5)
    assert (module.hparams.lora_r, module.hparams.weight_decay, module.hparams.temperature) == (2, 0.5, 1.0)
    module.configure_model()
    network = module.network
    module.configure_model()
    assert module.network is network


class Logs(TextModule):
    """Logs the numbers that it is fed."""

    def __init__(self, model):
        super().__init__(model)
        self.parameter = torch.nn.Parameter(torch.ones(()))

    def build(self):
        return []

    def training_step(self, batch, batch_idx):
        self.log_mean("a/b", batch["x"], batch["mask"], batch_size=1)
        return self.mean_loss(self.parameter * batch["x"][batch["mask"]].sum(), batch["mask"].sum())


def test_logged_means_and_losses_are_over_items_not_over_batches(policy, fit, gradients):
    batches = [
        {"x": torch.tensor([1.0, torch.nan]), "mask": torch.tensor([True, False])},
        {"x": torch.tensor([2.0, 3.0, 6.0]), "mask": torch.tensor([True] * 3)},
    ]
    module = fit(Logs(policy), batches, accumulate_grad_batches=2, max_epochs=2, callbacks=[gradients])
    assert module.trainer.callback_metrics["a/b"] == 3.0  # (1 + 2 + 3 + 6) / 4, of the last epoch alone
    assert [g["parameter"].item() for g in gradients.steps] == [3.0, 3.0]


def test_a_last_step_of_fewer_batches_is_a_mean_too(policy, fit, gradients):
    batches = [{"x": torch.tensor([float(i)]), "mask": torch.tensor([True])} for i in (1, 3, 8)]
    fit(Logs(policy), batches, accumulate_grad_batches=2, callbacks=[gradients])
    assert [g["parameter"].item() for g in gradients.steps] == [2.0, 8.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, r"`dtype` must be one of \['float32', 'bfloat16', 'float16'\], but got 'int8'"),
        ({"lora_r": -1}, "`lora_r` must be at least 0, but got -1"),
        ({"learning_rate": -1.0}, "`learning_rate` must be at least 0"),
        ({"warmup_ratio": 1.5}, "`warmup_ratio` must be between 0 and 1, but got 1.5"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "`warmup_ratio` must be 0 where `warmup_steps` is given"),
        ({"warmup_steps": -1}, "`warmup_steps` must be at least 0, but got -1"),
        ({"min_lr_ratio": 2.0}, "`min_lr_ratio` must be between 0 and 1, but got 2.0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"temperature": 0.0}, "`temperature` must be above 0"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_named(sft, options, message):
    with pytest.raises(ValueError, match=message):
        sft(**options)


def test_steps_are_counted_on_from_a_checkpoint_behind_an_epochs_last_batch(sft, fit, tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    fit(sft(), [BATCH, BATCH], callbacks=[Save()], max_epochs=2)
    resumed = fit(sft(), [BATCH, BATCH], ckpt_path=tmp_path / "a.ckpt", max_epochs=2)
    assert resumed.trainer.global_step == 4
    assert resumed.trainer.fit_loop.epoch_loop._batches_that_stepped == 4  # what loggers count by


def test_checkpoints_of_another_library_are_refused(sft, fit, tmp_path):
    module = fit(sft(), [BATCH])
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del checkpoint["module_class"]
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="written by another library and does not fit this SFTModule"):
        SFTModule.load_from_checkpoint(tmp_path / "b.ckpt", weights_only=True)


def test_a_model_given_as_an_object_is_in_the_module_once(policy):
    network = make_llama(vocab_size=8)
    module = SFTModule(network, tokenizer=policy)
    module.configure_model()
    assert all(name.startswith("network.") for name in module.state_dict())
    assert module.network is network


def test_gradient_clipping_by_value(sft, fit, new_gradients):
    def steps(**options):
        watch = new_gradients()
        fit(sft(), [BATCH], callbacks=[watch], **options)
        return watch.steps[0]

    free = steps()
    bound = torch.cat([g.flatten() for g in free.values()]).abs().median().item()
    for name, gradient in steps(gradient_clip_val=bound, gradient_clip_algorithm="value").items():
        torch.testing.assert_close(gradient, free[name].clamp(-bound, bound))


def test_both_groups_of_ppo_are_clipped_together(ppo, fit, new_gradients):
    def norm(clip):
        watch = new_gradients()
        module = fit(ppo(vf_coef=3.0), callbacks=[watch], gradient_clip_val=clip, max_steps=1)
        logged = [float(module.trainer.callback_metrics[f"{group}/grad_norm"]) for group in ("policy", "value")]
        return torch.stack([g.square().sum() for g in watch.steps[0].values()]).sum().sqrt().item(), logged

    free, groups = norm(None)
    assert min(groups) > 0
    assert math.hypot(*groups) == pytest.approx(free, rel=1e-5)
    clipped, of_before = norm(0.5 * free)
    assert clipped == pytest.approx(0.5 * free, rel=1e-4)
    assert of_before == pytest.approx(groups)


def test_a_fused_optimizer_steps_as_the_other(sft, fit):
    found = {}
    for fused in (True, False):
        module = fit(sft(fused_optimizer=fused, weight_decay=0.1), [BATCH] * 5)
        assert module.trainer.optimizers[0].defaults["fused"] is fused
        found[fused] = dict(module.named_parameters())
    for name, parameter in found[True].items():
        torch.testing.assert_close(parameter, found[False][name])


def test_the_optimizer_is_not_fused_where_losses_are_scaled(sft, make_trainer, monkeypatch):
    module = sft()
    module.configure_model()
    trainer = make_trainer()
    module.trainer = trainer
    monkeypatch.setattr(type(trainer), "estimated_stepping_batches", 3)
    assert module.configure_optimizers()["optimizer"].defaults["fused"]
    monkeypatch.setattr(trainer.precision_plugin, "scaler", object(), raising=False)
    assert not module.configure_optimizers()["optimizer"].defaults["fused"]


@pytest.mark.parametrize(("accumulate", "expected"), [(1, [False] * 4), (2, [False, True, False, True])])
def test_gradients_of_the_step_before_are_gone_in_a_forward_pass(sft, fit, accumulate, expected):
    class Watched(SFTModule):
        """Notes in each forward pass whether there are gradients."""

        def training_step(self, batch, batch_idx):
            seen.append(any(p.grad is not None for p in self.parameters()))
            return super().training_step(batch, batch_idx)

    seen = []
    module = fit(Watched(sft().hparams.model), [BATCH] * 4, accumulate_grad_batches=accumulate)
    assert seen == expected
    assert all(p.grad is not None for p in module.parameters())  # of the last step, to look at
