"""Preference optimisation: the loss against slow loops, labels, metrics, what is refused, saving and flags."""

import json
import math
import warnings

import pytest
import torch
import yaml
from conftest import make_llama, make_tokenizer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_rlhf.modules.objectives import CPO, DPO, IPO, ORPO, ForwardKL, Hinge, SimPO
from lightning_rlhf.modules.preference import PreferenceModule
from lightning_rlhf.train import main

PROMPTS = [[1, 2], [4], [6, 7, 7]]
CHOSEN = [[3, 0], [5, 5, 2, 0], [1, 0]]
REJECTED = [[2, 2, 6, 0], [6, 0], [7, 3, 0]]
OBJECTIVES = {
    "DPO": DPO(0.3),
    "forward KL": DPO(0.3, ForwardKL()),
    "IPO": IPO(0.2),
    "Hinge": Hinge(0.2),
    "SimPO": SimPO(2.0, 0.7),
    "CPO": CPO(0.3, 0.5),
    "ORPO": ORPO(0.4),
}
NAME = "lightning_rlhf.modules.preference.PreferenceModule"


def pairs(which=slice(None), extra=0, garbage=0, **columns):
    """A batch as `PreferenceDataModule` makes it, with more padding if wanted."""
    prompts = PROMPTS[which]
    answers = [(p, a) for p, a in zip(prompts + prompts, CHOSEN[which] + REJECTED[which], strict=True)]
    width = max(len(p) + len(a) for p, a in answers) + extra
    fill = [width - len(p) - len(a) for p, a in answers]
    batch = {
        "input_ids": [[*p, *a, *[garbage] * n] for (p, a), n in zip(answers, fill, strict=True)],
        "attention_mask": [[1] * (width - n) + [0] * n for n in fill],
        "loss_mask": [
            [False] * len(p) + [True] * len(a) + [False] * n for (p, a), n in zip(answers, fill, strict=True)
        ],
        "margin": [0.0] * len(prompts),
    }
    batch |= {name: values[which] for name, values in columns.items()}
    return {name: torch.tensor(values) for name, values in batch.items()}


def slow_logprob(network, prompt, answer):
    """log π(answer | prompt), token by token."""
    logits = network(torch.tensor([prompt + answer])).logits[0].double()
    return sum(logits[len(prompt) + t - 1].log_softmax(-1)[token] for t, token in enumerate(answer))


def slow_loss(name, w, l, ref_w, ref_l, n_w, n_l):  # noqa: E741
    """The papers' losses, one pair at a time."""
    u_w, u_l = w - ref_w, l - ref_l

    def choice(x):
        return -torch.sigmoid(x).log()

    def odds(p):
        return p.exp() / (1 - p.exp())

    return {
        "DPO": lambda: choice(0.3 * u_w - 0.3 * u_l),
        "forward KL": lambda: choice(0.3 * (-u_w).exp() * -1 + 0.3 * (-u_l).exp()),
        "IPO": lambda: (u_w - u_l - 1 / (2 * 0.2)) ** 2,
        "Hinge": lambda: max(1 - 0.2 * (u_w - u_l), torch.zeros(()).double()),
        "SimPO": lambda: choice(2.0 / n_w * w - 2.0 / n_l * l - 0.7),
        "CPO": lambda: choice(0.3 * w - 0.3 * l) - 0.5 * w / n_w,
        "ORPO": lambda: -w / n_w + 0.4 * choice((odds(w / n_w) / odds(l / n_l)).log()),
    }[name]()


def slow_losses(name, network, reference):
    found = []
    for prompt, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        logprobs = [slow_logprob(network, prompt, answer) for answer in (chosen, rejected)]
        with torch.no_grad():
            ref_logprobs = [slow_logprob(reference, prompt, answer) for answer in (chosen, rejected)]
        found.append(slow_loss(name, *logprobs, *ref_logprobs, len(chosen), len(rejected)))
    return found


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """The folder of another language model of the same eight tokens."""
    folder = tmp_path_factory.mktemp("other")
    make_llama(seed=4, vocab_size=8).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def preference(policy):
    def make(model=policy, **options):
        return PreferenceModule(model, **(dict(learning_rate=1e-2, lr_scheduler="constant") | options))

    return make


@pytest.fixture
def loss_of(fit, new_gradients):
    """Mean loss and gradients of one optimizer step."""

    def run(module, batches, **trainer):
        torch.manual_seed(0)
        watch = new_gradients()
        fit(module, batches, callbacks=[watch], **trainer)
        (gradients,) = watch.steps
        return module.trainer.callback_metrics["train/loss"].item(), gradients

    return run


# --- the loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_the_definition_as_a_loop(name, preference, policy, other, loss_of):
    objective = OBJECTIVES[name]
    options = {"reference": other} if objective.uses_reference else {}
    loss, gradients = loss_of(preference(objective=objective, **options), [pairs()])
    slow, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in (policy, other))
    expected = torch.stack(slow_losses(name, slow, reference)).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    for key, p in slow.named_parameters():
        torch.testing.assert_close(gradients["policy." + key], p.grad, rtol=1e-3, atol=3e-5)
    assert max(g.abs().max() for g in gradients.values()) > 1e-2


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_at_the_start_dpo_is_log_2_and_its_gradient_half_beta_times_the_difference(
    options, preference, policy, loss_of
):
    loss, gradients = loss_of(preference(objective=DPO(0.3), **options), [pairs()])
    assert loss == pytest.approx(math.log(2), rel=1e-6)
    slow = AutoModelForCausalLM.from_pretrained(policy)
    differences = [
        slow_logprob(slow, prompt, chosen) - slow_logprob(slow, prompt, rejected)
        for prompt, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    ]
    (-0.3 * 0.5 * torch.stack(differences).mean()).backward()
    if not options:
        for key, p in slow.named_parameters():
            torch.testing.assert_close(gradients["policy." + key], p.grad, rtol=1e-3, atol=1e-5)


def test_ipo_stands_still_where_its_aim_is(preference, policy, other, loss_of):
    """One pair, and β such that 1 / (2β) is its difference of log-ratios."""
    networks = [AutoModelForCausalLM.from_pretrained(folder) for folder in (policy, other)]
    with torch.no_grad():
        u = [
            float(slow_logprob(networks[0], PROMPTS[0], a[0]) - slow_logprob(networks[1], PROMPTS[0], a[0]))
            for a in (CHOSEN, REJECTED)
        ]
    batch = pairs(slice(0, 1))
    if u[0] < u[1]:
        batch = {name: torch.cat(x.chunk(2)[::-1]) if len(x) == 2 else x for name, x in batch.items()}
    aim = abs(u[0] - u[1])
    loss, gradients = loss_of(preference(objective=IPO(1 / (2 * aim)), reference=other), [batch])
    assert loss == pytest.approx(0, abs=1e-8)
    assert max(g.abs().max() for g in gradients.values()) < 1e-3
    loss, _ = loss_of(preference(objective=IPO(1 / (2 * (aim + 3))), reference=other), [batch])
    assert loss == pytest.approx(9, rel=1e-4)


@pytest.mark.parametrize("name", ["DPO", "SimPO", "ORPO"])
@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_accumulation_and_padding_change_no_gradient(name, options, preference, loss_of):
    ways = [
        ([pairs()], 1),
        ([pairs(slice(0, 1)), pairs(slice(1, 3))], 2),
        ([pairs(slice(k, k + 1)) for k in range(3)], 3),
        ([pairs(extra=4, garbage=5)], 1),
    ]
    found = []
    for batches, accumulate in ways:
        module = preference(objective=OBJECTIVES[name], **options)
        found.append(loss_of(module, batches, accumulate_grad_batches=accumulate))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for key, gradient in found[0][1].items():
            torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_a_few_pairs_are_learned(name, options, preference, fit):
    module = fit(preference(objective=OBJECTIVES[name], **options), [pairs()] * 20)
    metrics = module.trainer.callback_metrics
    assert metrics["train/accuracy"] > 0.5
    with torch.no_grad():
        found = module.predict_step(pairs(), 0)
    assert all(a > b for a, b in zip(found["reward_chosen"], found["reward_rejected"], strict=True))


# --- labels -------------------------------------------------------------------------------------------------------


def both_ways(preference, loss_of, other, **options):
    """Mean loss of the pairs as they are, and swapped."""
    swapped = {name: torch.cat(x.chunk(2)[::-1]) if len(x) == 6 else x for name, x in pairs().items()}
    options = dict(objective=DPO(0.3), reference=other) | options
    return [loss_of(preference(**options), [batch])[0] for batch in (pairs(), swapped)]


@pytest.mark.parametrize(
    ("options", "p"),
    [({"label_smoothing": 0.1}, 0.9), ({"label_smoothing": 0.2, "robust": True}, 0.8 / 0.6), ({}, 1.0)],
    ids=str,
)
@pytest.mark.parametrize("objective", [DPO(0.3), IPO(0.2)], ids=["DPO", "IPO"])
def test_noise_is_a_change_of_the_label(options, p, objective, preference, loss_of, other):
    one, zero = both_ways(preference, loss_of, other, objective=objective)
    assert abs(one - zero) > 0.05
    found, _ = loss_of(preference(objective=objective, reference=other, **options), [pairs()])
    assert found == pytest.approx(p * one + (1 - p) * zero, rel=1e-5)


def test_shares_of_people_are_labels(preference, loss_of, other):
    one, zero = both_ways(preference, loss_of, other)
    whole = {"objective": DPO(0.3), "reference": other}
    for shares, expected in (([1.0] * 3, one), ([0.0] * 3, zero), ([0.25] * 3, 0.25 * one + 0.75 * zero)):
        found, _ = loss_of(preference(**whole), [pairs(preference=shares)])
        assert found == pytest.approx(expected, rel=1e-5)
    found, _ = loss_of(preference(**whole, label_smoothing=0.1), [pairs(preference=[0.25] * 3)])
    assert found == pytest.approx(0.3 * one + 0.7 * zero, rel=1e-5)  # 0.25 · 0.9 + 0.75 · 0.1


# --- what is seen -------------------------------------------------------------------------------------------------


def loader(batches):
    return DataLoader(batches, batch_size=None)


def slow_figures(policy, other):
    """What evaluation logs for DPO with β = 0.3, in loops."""
    networks = [AutoModelForCausalLM.from_pretrained(folder) for folder in (policy, other)]
    rewards, logprobs, kls, entropies = [], [], [], []
    with torch.no_grad():
        for answers in (CHOSEN, REJECTED):
            both = [[float(slow_logprob(n, p, a)) for p, a in zip(PROMPTS, answers, strict=True)] for n in networks]
            logprobs.append(both[0])
            rewards.append([0.3 * (a - b) for a, b in zip(*both, strict=True)])
            for prompt, answer in zip(PROMPTS, answers, strict=True):
                logps = [n(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1) for n in networks]
                where = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
                kls += [
                    sum(float(logps[0][t, v].exp() * (logps[0][t, v] - logps[1][t, v])) for v in range(8))
                    for t in where
                ]
                entropies += [-sum(float(logps[0][t, v].exp() * logps[0][t, v]) for v in range(8)) for t in where]
    margins = [a - b for a, b in zip(*rewards, strict=True)]
    return {
        "loss": sum(math.log1p(math.exp(-m)) for m in margins) / 3,
        "reward_chosen": sum(rewards[0]) / 3,
        "reward_rejected": sum(rewards[1]) / 3,
        "margin": sum(margins) / 3,
        "accuracy": sum(m > 0 for m in margins) / 3,
        "logprob_chosen": sum(logprobs[0]) / 3,
        "logprob_rejected": sum(logprobs[1]) / 3,
        "kl_per_token": sum(kls) / len(kls),
        "entropy": sum(entropies) / len(entropies),
    }


def test_evaluation_reports_means_over_pairs_the_exact_kl_and_the_entropy(preference, make_trainer, policy, other):
    expected = slow_figures(policy, other)
    assert expected["kl_per_token"] > 0.1
    batches = [pairs(slice(0, 1), extra=2, garbage=3), pairs(slice(1, 3))]
    trainer = make_trainer()
    for stage, evaluate in (("val", trainer.validate), ("test", trainer.test)):
        module = preference(objective=DPO(0.3), reference=other)
        metrics = evaluate(module, loader(batches), verbose=False)[0]
        assert metrics == {f"{stage}/{name}": pytest.approx(value, rel=1e-4) for name, value in expected.items()}


def test_training_reports_the_same_of_the_pairs(preference, fit, policy, other):
    expected = slow_figures(policy, other)
    module = fit(preference(objective=DPO(0.3), reference=other, learning_rate=0.0), [pairs()])
    metrics = module.trainer.callback_metrics
    for name, value in expected.items():
        if name in ("kl_per_token", "entropy"):  # they take a pass over all logits
            assert f"train/{name}" not in metrics
        else:
            assert metrics[f"train/{name}"].item() == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("stage", ["val", "test"])
def test_accuracy_by_source(preference, make_trainer, policy, other, stage):
    networks = [AutoModelForCausalLM.from_pretrained(folder) for folder in (policy, other)]
    right = []
    with torch.no_grad():
        for prompt, *answers in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
            u = [slow_logprob(networks[0], prompt, a) - slow_logprob(networks[1], prompt, a) for a in answers]
            right.append(float(u[0] > u[1]))
    assert len(set(right)) == 2
    alone = right.index(1 - sorted(right)[1])  # the one that is not as the other two
    sources = ["two"] * 3
    sources[alone] = "one/"
    batches = [pairs(part) | {"source": sources[part]} for part in (slice(0, 1), slice(1, 3))]
    trainer = make_trainer()
    evaluate = trainer.validate if stage == "val" else trainer.test
    metrics = evaluate(preference(objective=DPO(0.3), reference=other), loader(batches), verbose=False)[0]
    found = {name: value for name, value in metrics.items() if "accuracy/" in name}
    assert found == {f"{stage}/accuracy/one": right[alone], f"{stage}/accuracy/two": 1 - right[alone]}


def test_a_tie_is_half_right(preference, fit):
    module = fit(preference(learning_rate=0.0), [pairs()])  # policy == reference: all rewards are 0
    assert module.trainer.callback_metrics["train/accuracy"] == 0.5


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_the_kl_is_0_at_the_start_and_grows(preference, make_trainer, fit, options):
    module = preference(**options)
    before = make_trainer().validate(module, loader([pairs()]), verbose=False)[0]["val/kl_per_token"]
    assert before == pytest.approx(0, abs=1e-6)
    fit(module, [pairs()] * 5)
    after = make_trainer().validate(module, loader([pairs()]), verbose=False)[0]
    assert after["val/kl_per_token"] > 1e-3


@pytest.mark.parametrize("objective", [SimPO(), CPO(), ORPO()], ids=["SimPO", "CPO", "ORPO"])
def test_objectives_without_a_reference_load_none_and_report_no_kl(objective, preference, make_trainer):
    module = preference(objective=objective)
    metrics = make_trainer().validate(module, loader([pairs()]), verbose=False)[0]
    assert module.reference is None
    assert "val/kl_per_token" not in metrics
    assert "val/reward_chosen" in metrics


def test_predictions_are_completions_and_rewards(preference, make_trainer, policy, other):
    module = preference(objective=DPO(0.3), reference=other)
    found = make_trainer().predict(module, loader([pairs()]))[0]
    assert found["chosen"] == ["\3", "\5\5\2", "\1"]
    assert found["rejected"] == ["\2\2\6", "\6", "\7\3"]
    expected = slow_figures(policy, other)
    assert sum(found["reward_chosen"]) / 3 == pytest.approx(expected["reward_chosen"], rel=1e-4)
    assert sum(found["reward_rejected"]) / 3 == pytest.approx(expected["reward_rejected"], rel=1e-4)


def test_validation_disturbs_no_weight(preference, make_trainer):
    ends = []
    for share in (0, 1.0):
        module = preference(lora_r=4)
        torch.manual_seed(0)
        make_trainer(max_epochs=2, limit_val_batches=share).fit(module, loader([pairs()] * 2), loader([pairs()]))
        ends.append({name: p.clone() for name, p in module.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.5}, "`label_smoothing` must be at least 0 and below 0.5, but got 0.5"),
        ({"label_smoothing": -0.1}, "`label_smoothing` must be at least 0"),
        ({"robust": True}, "`robust` must be False where `label_smoothing` is 0"),
        ({"objective": SimPO(), "reference": "x"}, "`reference` must be None with SimPO, which uses no reference"),
        ({"objective": ORPO(), "reference_cache": "x"}, "`reference_cache` must be None with ORPO"),
    ],
)
def test_arguments_that_cannot_work(options, message, preference):
    with pytest.raises(ValueError, match=message):
        preference(**options)


@pytest.mark.parametrize(
    "batch",
    [
        {name: x for name, x in pairs().items() if name != "margin"},
        {name: x[:5] if len(x) == 6 else x for name, x in pairs().items()},
        pairs() | {"label": torch.ones(6, dtype=torch.bool)},
        {name: x for name, x in pairs().items() if name != "loss_mask"},
    ],
    ids=["no margin", "odd", "label", "no loss mask"],
)
@pytest.mark.parametrize("step", ["training_step", "validation_step", "predict_step"])
def test_batches_that_are_no_pairs(batch, step, preference):
    with pytest.raises(ValueError, match=r"`--data` must be a `PreferenceDataModule`: .* but got \d rows with \["):
        getattr(preference(), step)(batch, 0)


# --- saving, loading, flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_a_resumed_run_goes_on_bit_for_bit_with_its_first_reference(preference, fit, tmp_path, options):
    settings = dict(lr_scheduler="linear", objective=IPO(0.2), **options)
    data = [pairs(slice(0, 2)), pairs(slice(2, 3))]
    torch.manual_seed(0)  # LoRA's start is random
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fit(preference(**settings), data, max_epochs=4, callbacks=[keep], enable_checkpointing=True)
    torch.manual_seed(1)
    resumed = fit(preference(**settings), data, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.trainer.global_step == whole.trainer.global_step == 8
    for name, p in whole.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name


def test_checkpoints_hold_what_is_trained_and_load_without_unpickling(preference, fit, tmp_path, other):
    module = fit(preference(objective=IPO(0.2), reference=other), [pairs()])
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert all(name.startswith("policy.") for name in checkpoint["state_dict"])
    assert "objective" not in checkpoint["hyper_parameters"]
    loaded = PreferenceModule.load_from_checkpoint(tmp_path / "a.ckpt", objective=IPO(0.2), weights_only=True)
    with torch.no_grad():
        expected, found = (m.predict_step(pairs(), 0) for m in (module, loaded))
    assert found["reward_chosen"] == pytest.approx(expected["reward_chosen"], rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_an_exported_model_has_the_same_logits(preference, fit, tmp_path, options):
    module = fit(preference(**options), [pairs()] * 2)
    module.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        torch.testing.assert_close(loaded, module.policy(ids).logits, rtol=1e-4, atol=1e-5)


class TestFlags:
    @pytest.fixture
    def model_config(self, monkeypatch, capsys):
        """The model's part of what `--print_config` prints; nothing is built."""
        monkeypatch.setattr("sys.argv", ["train.py"])

        def parse(*flags):
            data = ["--data", "PreferenceDataModule", "--data.data", "x.jsonl"]
            with pytest.raises(SystemExit) as stopped:
                main(["fit", *flags, *data, "--print_config"])
            assert stopped.value.code == 0
            return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]

        return parse

    def test_the_objective_is_chosen_by_its_class(self, model_config):
        flags = ["--model", NAME, "--model.model", "m"]
        assert model_config(*flags)["objective"] is None
        found = model_config(*flags, "--model.objective", "IPO", "--model.objective.beta", "0.7")["objective"]
        assert found == {"class_path": "lightning_rlhf.modules.objectives.IPO", "init_args": {"beta": 0.7}}
        found = model_config(*flags, "--model.objective", "SimPO")["objective"]
        assert found["init_args"] == {"beta": 2.0, "gamma": 1.0}

    def test_a_divergence_too(self, model_config):
        flags = ["--model", NAME, "--model.model", "m", "--model.objective", "DPO"]
        found = model_config(
            *flags, "--model.objective.divergence", "Alpha", "--model.objective.divergence.alpha", "0.3"
        )
        assert found["objective"]["init_args"]["divergence"] == {
            "class_path": "lightning_rlhf.modules.objectives.Alpha",
            "init_args": {"alpha": 0.3},
        }

    def test_both_work_from_yaml(self, model_config, tmp_path):
        objective = {"class_path": "DPO", "init_args": {"beta": 0.4, "divergence": {"class_path": "JensenShannon"}}}
        init_args = {"model": "m", "objective": objective, "label_smoothing": 0.1}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": {"class_path": NAME, "init_args": init_args}}))
        found = model_config("--config", str(tmp_path / "c.yaml"))
        assert found["label_smoothing"] == 0.1
        assert found["objective"]["init_args"]["beta"] == 0.4
        assert found["objective"]["init_args"]["divergence"]["class_path"].endswith(".JensenShannon")

    def test_a_run_by_flags_is_saved_resumed_and_exported(self, monkeypatch, policy, tmp_path):
        monkeypatch.setattr("sys.argv", ["train.py"])
        rows = [
            {"prompt": "\1", "chosen": "\2\3", "rejected": "\4"},
            {"prompt": "\5", "chosen": "\2", "rejected": "\6"},
        ]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = ["--model", NAME, "--model.model", policy, "--model.objective", "IPO", "--model.objective.beta", "0.2"]
        data = ["--data", "PreferenceDataModule", "--data.data", str(tmp_path / "pairs.jsonl")]
        quiet = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
        where = [
            "--trainer.default_root_dir",
            str(tmp_path / "run"),
            "--ckpt_path",
            "last",
            "--trainer.log_every_n_steps=1",
        ]
        cache = ["--model.reference_cache", str(tmp_path / "cache")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice
            for epochs in ("1", "2"):
                cli = main(["fit", *model, *data, *quiet, *where, *cache, "--trainer.max_epochs", epochs])
        assert cli.trainer.global_step == 2
        assert cli.model.objective.beta == 0.2
        assert (tmp_path / "run/model/config.json").is_file()
        saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
        assert "objective" not in saved["hyper_parameters"]

    def test_a_wrong_objective_is_refused_by_name(self, monkeypatch, capsys):
        monkeypatch.setattr("sys.argv", ["train.py"])
        flags = ["--model", NAME, "--model.model", "m", "--model.objective", "IPPO", "--data", "PreferenceDataModule"]
        with pytest.raises(SystemExit):
            main(["fit", *flags, "--data.data", "x.jsonl"])
        assert "IPPO" in capsys.readouterr().err
