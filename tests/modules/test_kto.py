"""KTO: the loss and its reference point in slow loops, gradients, weights, logs, resuming, LoRA, export."""

import math

import pytest
import torch
from conftest import make_llama
from datasets import Dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_rlhf.datamodules import PreferenceDataModule, UnpairedDataModule
from lightning_rlhf.modules.kto import KTOModule

# Prompt, completion, whether it is desirable.
ROWS = [([1, 2], [3, 4, 0], True), ([5], [6, 0], False), ([7, 7, 1], [2, 2, 5, 0], False), ([3], [1, 0], True)]


def mismatched(rows):
    """Each prompt with the completion of the next row."""
    return [(prompt, after, good) for (prompt, _, good), (_, after, _) in zip(rows, rows[1:] + rows[:1], strict=True)]


def batch(rows, extra=0, garbage=0, drop=()):
    """As `UnpairedDataModule` makes it; mismatches of the rows in `drop` have no target."""
    both = rows + mismatched(rows)
    width = max(len(prompt) + len(answer) for prompt, answer, _ in both) + extra
    ids = [[*p, *a] + [garbage] * (width - len(p) - len(a)) for p, a, _ in both]
    targets = [[len(p) <= t < len(p) + len(a) for t in range(width)] for p, a, _ in both]
    for row in drop:
        targets[len(rows) + row] = [False] * width
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor([[int(t < len(p) + len(a)) for t in range(width)] for p, a, _ in both]),
        "loss_mask": torch.tensor(targets),
        "label": torch.tensor([good for _, _, good in rows]),
    }


def logprob(network, prompt, answer):
    """log π of a completion, token by token, float64."""
    logits = network(torch.tensor([prompt + answer])).logits[0].double()
    return sum(logits[len(prompt) + t - 1].log_softmax(-1)[token] for t, token in enumerate(answer))


def slow(network, reference, rows, beta=0.1, good=1.0, bad=1.0, drop=()):
    """Losses, u and z of a batch, by the equations of the paper."""

    def ratio(row):
        with torch.no_grad():
            below = logprob(reference, *row[:2])
        return logprob(network, *row[:2]) - below

    with torch.no_grad():
        drift = [ratio(row) for i, row in enumerate(mismatched(rows)) if i not in drop]
        z = max(0.0, float(sum(drift)) / max(len(drift), 1))
    u = [ratio(row) for row in rows]
    values = [1 / (1 + (-beta * (x - z if row[2] else z - x)).exp()) for x, row in zip(u, rows, strict=True)]
    losses = [(good if row[2] else bad) * (1 - value) for value, row in zip(values, rows, strict=True)]
    return torch.stack(losses), torch.stack(u), z


@pytest.fixture
def kto(policy):
    def make(model=policy, **options):
        return KTOModule(model, tokenizer=policy, **(dict(learning_rate=1e-2, lr_scheduler="constant") | options))

    return make


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """The folder of another language model, so that u and z are not 0 at the start."""
    folder = tmp_path_factory.mktemp("other")
    make_llama(seed=1, vocab_size=8).save_pretrained(folder)
    return str(folder)


def network_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).double()


def evaluated(make_trainer, module, *batches):
    """What validation says of the batches."""
    return make_trainer().validate(module, DataLoader(batches, batch_size=None), verbose=False)[0]


def kinds(rows):
    return torch.tensor([row[2] for row in rows])


def test_z_is_cut_off_for_one_of_two_models_and_not_for_the_other(policy, other):
    """So that the tests below, which take each as the other's reference, see both cases."""
    first, second = network_of(policy), network_of(other)
    assert slow(first, second, ROWS)[2] == 0
    assert slow(second, first, ROWS)[2] > 0.1


def slow_distributions(network, reference):
    """Entropy, and KL to the reference, of every token of the completions, over the whole vocabulary."""
    entropies, kls = [], []
    for prompt, answer, _ in ROWS:
        with torch.no_grad():
            ids = torch.tensor([prompt + answer])
            p, q = (n(ids).logits[0].double().log_softmax(-1) for n in (network, reference))
        for t in range(len(prompt) - 1, len(prompt) + len(answer) - 1):
            entropies.append(-sum(math.exp(x) * x for x in p[t].tolist()))
            kls.append(sum(math.exp(x) * (x - y) for x, y in zip(p[t].tolist(), q[t].tolist(), strict=True)))
    return {"entropy": sum(entropies) / len(entropies), "kl_per_token": sum(kls) / len(kls)}


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_agree_with_the_equations(kto, make_trainer, policy, other, swap, extra, stage):
    model, reference = (other, policy) if swap else (policy, other)
    network = network_of(model).requires_grad_(False)
    losses, u, z = slow(network, network_of(reference), ROWS, beta=0.3, good=1.5, bad=0.5)
    module = kto(model, reference=reference, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    loader, trainer = DataLoader([batch(ROWS, extra, garbage=6)], batch_size=None), make_trainer()
    found = (trainer.validate if stage == "val" else trainer.test)(module, loader, verbose=False)[0]
    good, rewards = kinds(ROWS), 0.3 * u
    right = [1.0 if (x > z) == row[2] else 0.0 for x, row in zip(u.tolist(), ROWS, strict=True)]
    logprobs = torch.stack([logprob(network, p, a) for p, a, _ in ROWS])
    expected = {
        "loss": losses.mean(),
        "kl": z,
        "reward_desirable": 0.3 * u[good].mean(),
        "reward_undesirable": 0.3 * u[~good].mean(),
        "logprob_desirable": logprobs[good].mean(),
        "logprob_undesirable": logprobs[~good].mean(),
        "accuracy": sum(right) / 4,
        "margin": rewards[good].mean() - rewards[~good].mean(),
        **slow_distributions(network, network_of(reference)),
    }
    assert found == {f"{stage}/{k}": pytest.approx(float(v), rel=1e-4, abs=1e-6) for k, v in expected.items()}


def test_metrics_are_means_over_all_rows_and_z_over_batches(kto, make_trainer, policy, other):
    parts = ROWS[:3], [ROWS[3], ROWS[1]]
    found = evaluated(make_trainer, kto(other, reference=policy), *map(batch, parts))
    losses, u, z = zip(*[slow(network_of(other), network_of(policy), rows) for rows in parts], strict=True)
    good = kinds(parts[0] + parts[1])
    assert found["val/loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert found["val/reward_desirable"] == pytest.approx(0.1 * torch.cat(u)[good].mean().item(), rel=1e-4)
    assert found["val/reward_undesirable"] == pytest.approx(0.1 * torch.cat(u)[~good].mean().item(), rel=1e-4)
    assert found["val/kl"] == pytest.approx(sum(z) / 2, rel=1e-4)
    rewards = 0.1 * torch.cat(u)
    expected = rewards[good].mean() - rewards[~good].mean()
    assert found["val/margin"] == pytest.approx(expected.item(), rel=1e-4)
    triples = zip(u, z, parts, strict=True)
    right = [float((x > of) == row[2]) for us, of, rows in triples for x, row in zip(us, rows, strict=True)]
    assert found["val/accuracy"] == pytest.approx(sum(right) / 5)


def test_mismatches_without_targets_do_not_count(kto, make_trainer, policy, other):
    module, found = kto(other, reference=policy), {}
    for drop in ((), (1,), (0, 1, 2, 3)):
        _, _, z = slow(network_of(other), network_of(policy), ROWS, drop=drop)
        found[drop] = evaluated(make_trainer, module, batch(ROWS, drop=drop))["val/kl"]
        assert found[drop] == pytest.approx(z, rel=1e-4, abs=1e-6)
    assert len(set(found.values())) == 3
    assert found[0, 1, 2, 3] == 0


def step(fit, new_gradients, module, batches, **trainer):
    """The gradient of the one optimizer step of these batches."""
    watch = new_gradients()
    torch.manual_seed(0)
    fit(module, batches, callbacks=[watch], accumulate_grad_batches=len(batches), **trainer)
    assert len(watch.steps) == 1
    return watch.steps[0]


def assert_slow_gradient(found, network, losses):
    losses.mean().backward()
    for name, p in network.named_parameters():
        torch.testing.assert_close(found["policy." + name].double(), p.grad, rtol=1e-3, atol=1e-6)
    assert max(g.abs().max() for g in found.values()) > 1e-2


@pytest.mark.parametrize("swap", [False, True])
def test_the_gradient_is_that_of_the_equations(kto, fit, new_gradients, policy, other, swap):
    model, reference = (other, policy) if swap else (policy, other)
    options = dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    found = step(fit, new_gradients, kto(model, reference=reference, **options), [batch(ROWS)])
    network = network_of(model)
    assert_slow_gradient(found, network, slow(network, network_of(reference), ROWS, 0.3, 1.5, 0.5)[0])


def test_accumulation_averages_over_all_rows_but_each_batch_has_its_own_z(kto, fit, new_gradients, policy, other):
    """What the docstring says: the loss is one mean, however unequal the batches are; z is measured batch by batch."""
    parts = [ROWS[:3], [ROWS[3], ROWS[1]]]
    found = step(fit, new_gradients, kto(other, reference=policy, beta=0.3), [batch(rows) for rows in parts])
    network, reference = network_of(other), network_of(policy)
    losses, _, z = zip(*[slow(network, reference, rows, beta=0.3) for rows in parts], strict=True)
    assert abs(z[0] - z[1]) > 0.1
    assert_slow_gradient(found, network, torch.cat(losses))
    whole = step(fit, new_gradients, kto(other, reference=policy, beta=0.3), [batch(parts[0] + parts[1])])
    assert not all(torch.allclose(whole[name], found[name], rtol=1e-2, atol=1e-4) for name in found)


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_padding_changes_no_gradient(kto, fit, new_gradients, policy, other, options):
    plain, padded = (
        step(fit, new_gradients, kto(other, reference=policy, **options), [batch(ROWS, extra, garbage)])
        for extra, garbage in ((0, 0), (4, 5))
    )
    for name, gradient in plain.items():
        torch.testing.assert_close(padded[name], gradient, rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in plain.values()) > 1e-3


def test_mixed_precision_leaves_the_gradient_whole(kto, fit, new_gradients, policy, other):
    """The pass without gradient takes none from the other, though autocast gives both the weights that it cast."""
    exact, mixed = (
        step(fit, new_gradients, kto(other, reference=policy), [batch(ROWS)], precision=precision)
        for precision in ("32-true", "bf16-mixed")
    )
    assert mixed.keys() == exact.keys()
    for name, gradient in exact.items():
        assert (mixed[name] - gradient).norm() < 0.1 * gradient.norm(), name


@pytest.mark.parametrize("options", [{"beta": 0.5}, {"desirable_weight": 2.0}, {"undesirable_weight": 2.0}], ids=str)
def test_every_option_changes_the_gradient(kto, fit, new_gradients, policy, other, options):
    plain, changed = (
        step(fit, new_gradients, kto(other, reference=policy, **given), [batch(ROWS)]) for given in ({}, options)
    )
    assert max((plain[name] - changed[name]).abs().max() for name in plain) > 1e-3


@pytest.mark.parametrize("options", [{"learning_rate": 1e-3}, {"lora_r": 4}], ids=str)
def test_good_completions_become_likelier_and_bad_ones_less_likely(kto, fit, make_trainer, options):
    before = evaluated(make_trainer, kto(), batch(ROWS))
    assert before["val/loss"] == 0.5  # u = z = 0 where the policy is the reference
    assert before["val/kl"] == before["val/reward_desirable"] == before["val/reward_undesirable"] == 0
    assert before["val/accuracy"] == 0.5
    assert before["val/margin"] == 0
    module = fit(kto(beta=0.5, **options), [batch(ROWS)] * 40)
    trained = dict(module.trainer.callback_metrics)
    assert {"train/loss", "train/kl", "train/logprob_desirable", "train/logprob_undesirable"} <= trained.keys()
    assert trained["train/reward_desirable"] > 0 > trained["train/reward_undesirable"]
    after = evaluated(make_trainer, module, batch(ROWS))
    assert after["val/loss"] < 0.3
    assert trained["train/accuracy"] > 0.5
    assert after["val/accuracy"] == 1
    assert after["val/reward_desirable"] > 0.3
    assert after["val/reward_undesirable"] < -0.3
    assert after["val/logprob_desirable"] > before["val/logprob_desirable"] + 0.5
    assert after["val/logprob_undesirable"] < before["val/logprob_undesirable"] - 0.5


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_the_reference_is_the_start_and_the_export_is_the_policy(kto, fit, make_trainer, policy, tmp_path, options):
    """With LoRA the reference is the network with its adapter off; then the adapter is merged into what is exported."""
    liked = [(prompt, answer, True) for prompt, answer, _ in ROWS]  # so that mismatches become likelier, and z is not 0
    module = fit(kto(**options), [batch(liked)] * 4)
    module.save_pretrained(tmp_path)
    losses, u, z = slow(network_of(tmp_path), network_of(policy), ROWS)
    assert u.abs().min() > 0.01
    assert z > 0.01
    found = evaluated(make_trainer, module, batch(ROWS))
    assert found["val/loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert found["val/kl"] == pytest.approx(z, rel=1e-3)
    again = KTOModule(str(tmp_path))
    again.configure_model()
    assert again.tokenizer.decode([1, 2]) == "\1\2"


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_a_loaded_checkpoint_goes_on_bit_for_bit(kto, fit, tmp_path, options):
    settings = dict(lr_scheduler="linear", **options)
    data = [batch(ROWS[:2]), batch(ROWS[1:])]
    torch.manual_seed(0)  # LoRA's start is random
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fit(kto(**settings), data, max_epochs=4, callbacks=[keep], enable_checkpointing=True)
    torch.manual_seed(1)
    resumed = fit(kto(**settings), data, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.trainer.global_step == whole.trainer.global_step == 8
    for name, p in whole.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name
    for name, value in whole.trainer.callback_metrics.items():
        assert torch.equal(value, resumed.trainer.callback_metrics[name]), name


@pytest.mark.parametrize("paired", [False, True])
def test_it_learns_from_its_data_module(kto, fit, paired):
    rows = [{"prompt": chr(i), "chosen": "\3" * i, "rejected": "\4" * i} for i in range(1, 7)]
    if not paired:
        rows = [
            {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
            for row in rows
            for kind in ("chosen", "rejected")
        ]
    data = UnpairedDataModule(Dataset.from_list(rows), val_data=Dataset.from_list(rows), batch_size=5)
    module = fit(kto(beta=0.5, learning_rate=1e-3), data, max_epochs=10, limit_val_batches=1.0)
    assert module.trainer.global_step == 30
    metrics = module.trainer.callback_metrics
    assert metrics["val/reward_desirable"] > 0 > metrics["val/reward_undesirable"]
    assert metrics["val/loss"] < 0.4


def test_predictions_are_completions_and_their_rewards(kto, make_trainer, policy, other):
    found = make_trainer().predict(kto(other, reference=policy, beta=0.3), DataLoader([batch(ROWS)], batch_size=None))[
        0
    ]
    _, u, _ = slow(network_of(other), network_of(policy), ROWS)
    assert found["completion"] == ["\3\4", "\6", "\2\2\5", "\1"]
    assert found["label"] == [True, False, False, True]
    assert found["reward"] == pytest.approx((0.3 * u).tolist(), rel=1e-4)


def test_batches_of_pairs_are_refused(kto, fit):
    pairs = Dataset.from_list([{"prompt": "\1", "chosen": "\2", "rejected": "\3"}] * 4)
    with pytest.raises(ValueError, match=r"a `label` per completion, but this one has \[.*margin.*UnpairedDataModule"):
        fit(kto(), PreferenceDataModule(pairs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "`beta` must be above 0, but got 0.0"),
        ({"desirable_weight": -1.0}, "`desirable_weight` must be at least 0, but got -1.0"),
        (
            {"reference_cache": "cache"},
            "`reference_cache` must be None: the completions are mismatched .*, but got 'cache'",
        ),
        ({"undesirable_weight": -0.5}, "`undesirable_weight` must be at least 0, but got -0.5"),
    ],
)
def test_wrong_options_are_refused(kto, options, message):
    with pytest.raises(ValueError, match=message):
        kto(**options)
