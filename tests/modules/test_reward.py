"""Reward models: pairs, ratings, what evaluation reports, the normaliser, saving and loading."""

import math

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from lightning_rlhf.modules import RewardModule
from lightning_rlhf.modules.reward_objectives import compare
from lightning_rlhf.modules.scoring import ModelReward, Responses

CHOSEN = [[1, 2, 3, 0], [4, 5, 0], [6, 7, 7, 7, 1, 0]]
REJECTED = [[1, 2, 0], [4, 6, 6, 6, 0], [6, 0]]
MARGINS = [0.0, 1.5, 2.5]
TEXTS = [[1, 2, 0], [3, 0], [4, 5, 6, 7, 0], [2, 2, 2, 0], [6, 1, 0]]
RATINGS = [[1, 3], [2], [5, 4, 6], [2, 2], [4, 0]]


def padded(rows, extra=0, garbage=0):
    width = max(map(len, rows)) + extra
    return {
        "input_ids": torch.tensor([[*r, *[garbage] * (width - len(r))] for r in rows]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]),
    }


def pairs(which=slice(None), **options):
    margins = torch.tensor(MARGINS[which])
    return padded(CHOSEN[which] + REJECTED[which], **options) | {"margin": margins}


def rated(which=slice(None), **options):
    rows = RATINGS[which]
    width = max(map(len, rows))
    return padded(TEXTS[which], **options) | {
        "ratings": torch.tensor([[*map(float, r), *[99.0] * (width - len(r))] for r in rows]),
        "ratings_mask": torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in rows]),
    }


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def share(a, b):
    """How often a rater of the first rated higher than one of the second; half for a tie."""
    return sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b))


@pytest.fixture
def reward(policy):
    def make(model=policy, **options):
        return RewardModule(model, **(dict(learning_rate=1e-2, lr_scheduler="constant") | options))

    return make


@pytest.fixture
def scored(reward):
    """A module with a network, and the slow raw score of ids."""
    module = reward()
    module.configure_model()

    def raw(ids):
        with torch.no_grad():
            base = module.network.model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
            return float(base.double() @ module.network.head.weight[0].double())

    return module, raw


def loader(batches):
    return DataLoader(batches, batch_size=None)


# --- the loss -----------------------------------------------------------------------------------------------------


def test_scores_are_read_at_the_last_real_token_and_padding_does_not_matter(scored):
    module, raw = scored
    expected = torch.tensor([raw(ids) for ids in CHOSEN + REJECTED])
    for options in ({}, {"extra": 3}, {"extra": 3, "garbage": 5}):
        batch = padded(CHOSEN + REJECTED, **options)
        with torch.no_grad():
            torch.testing.assert_close(module.network.raw(**batch), expected)
            torch.testing.assert_close(module(batch), expected)  # no normaliser yet
    assert module.tokenizer.pad_token_id == module.tokenizer.eos_token_id == 0


def test_loss_of_pairs_with_margins(scored):
    module, raw = scored
    module.log = module.log_mean = module.log_range = lambda *_, **__: None
    differences = [raw(c) - raw(r) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    expected = -sum(log_sigmoid(d - m) for d, m in zip(differences, MARGINS, strict=True))
    assert module.training_step(pairs(), 0).item() == pytest.approx(expected, rel=1e-5)
    without = pairs() | {"margin": torch.zeros(3)}
    expected = -sum(log_sigmoid(d) for d in differences)
    assert module.training_step(without, 0).item() == pytest.approx(expected, rel=1e-5)


def test_loss_of_ratings_by_hand():
    """Texts rated (1, 3), (2), (2): p01 = 1/2, p02 = 1/2, p12 = 1/2; with (5) for the last, p02 = p12 = 0."""
    raw = torch.tensor([0.0, 1.0, 3.0])
    batch = {
        "ratings": torch.tensor([[1.0, 3.0], [2.0, 0.0], [5.0, 0.0]]),
        "ratings_mask": torch.tensor([[True, True], [True, False], [True, False]]),
    }
    difference, preference, margin, *_ = compare(raw, batch)
    assert difference.tolist() == [-1, -3, -2]
    assert preference.tolist() == [0.5, 0, 0]
    assert margin.tolist() == [0, 0, 0]


def test_loss_of_ratings_is_over_all_pairs_of_texts(scored):
    module, raw = scored
    module.log = module.log_mean = module.log_range = lambda *_, **__: None
    scores, expected = [raw(ids) for ids in TEXTS], 0.0
    for i in range(5):
        for j in range(i + 1, 5):
            p, d = share(RATINGS[i], RATINGS[j]), scores[i] - scores[j]
            expected -= p * log_sigmoid(d) + (1 - p) * log_sigmoid(-d)
    assert module.training_step(rated(), 0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_accumulation_and_padding_change_no_gradient(reward, fit, new_gradients, options):
    ways = [
        ([pairs()], 1),
        ([pairs(slice(0, 1)), pairs(slice(1, 3))], 2),
        ([pairs(slice(k, k + 1)) for k in range(3)], 3),
        ([pairs(extra=4, garbage=6)], 1),
    ]
    found = []
    for batches, accumulate in ways:
        torch.manual_seed(0)
        watch = new_gradients()
        fit(reward(**options), batches, callbacks=[watch], accumulate_grad_batches=accumulate)
        assert len(watch.steps) == 1
        found.append(watch.steps[0])
    assert any(name.endswith("score.weight") for name in found[0])
    for gradients in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_a_tiny_batch_is_learned_by_heart(reward, fit, options):
    module = fit(reward(**options), [pairs()] * 40)
    with torch.no_grad():
        scores = module(padded(CHOSEN + REJECTED))
    assert (scores[:3] - scores[3:] > torch.tensor(MARGINS)).all()
    rate = fit(reward(**options), [rated()] * 50)
    with torch.no_grad():
        order = rate(padded(TEXTS)).argsort().tolist()
    assert order[-1] == 2  # rated 5 on average, the others 2


def test_dtype_leaves_the_head_in_float32(reward, fit):
    for options in ({}, {"lora_r": 4}):
        module = fit(reward(dtype="bfloat16", **options), [pairs()])
        assert module.network.head.weight.dtype == torch.float32
        backbone = {p.dtype for n, p in module.network.named_parameters() if "score" not in n and "lora" not in n}
        assert backbone == {torch.bfloat16}
        assert module.network.raw(**padded(TEXTS)).dtype == torch.float32


# --- evaluation ---------------------------------------------------------------------------------------------------


def brute_agreement(scores, ratings, gap):
    better = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if ratings[i] - ratings[j] > gap]
    return sum((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for i, j in better) / len(better)


def brute_calibration(probabilities, labels):
    both = [(p, y) for p, y in zip(probabilities, labels, strict=True)]
    both += [(1 - p, 1 - y) for p, y in both]
    bins = {}
    for p, y in both:
        bins.setdefault(min(int(p * 10), 9), []).append((p, y))
    return sum(abs(sum(p - y for p, y in inside)) for inside in bins.values()) / len(both)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_figures_of_ratings_against_brute_force(scored, make_trainer, stage):
    module, raw = scored
    scores, means = [raw(ids) for ids in TEXTS], [sum(r) / len(r) for r in RATINGS]
    trainer = make_trainer()
    evaluate = trainer.validate if stage == "val" else trainer.test
    metrics = evaluate(module, loader([rated(slice(0, 3)), rated(slice(3, 5))]), verbose=False)[0]
    for name, gap in [("agreement", 0), ("agreement_gap_1", 1), ("agreement_gap_2", 2)]:
        assert metrics[f"{stage}/{name}"] == pytest.approx(brute_agreement(scores, means, gap)), name
    compared = [(0, 1), (0, 2), (1, 2), (3, 4)]  # within each batch
    p = [1 / (1 + math.exp(scores[j] - scores[i])) for i, j in compared]
    y = [share(RATINGS[i], RATINGS[j]) for i, j in compared]
    assert metrics[f"{stage}/calibration_error"] == pytest.approx(brute_calibration(p, y), rel=1e-4)
    losses = [-b * math.log(a) - (1 - b) * math.log(1 - a) for a, b in zip(p, y, strict=True)]
    assert metrics[f"{stage}/loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    a, b = torch.tensor(scores), torch.tensor(means)
    assert metrics[f"{stage}/pearson"] == pytest.approx(torch.corrcoef(torch.stack([a, b]))[0, 1].item(), rel=1e-3)
    ranks = torch.stack(
        [a.argsort().argsort().float(), torch.tensor([(b < x).sum() + ((b == x).sum() - 1) / 2 for x in b])]
    )
    assert metrics[f"{stage}/spearman"] == pytest.approx(torch.corrcoef(ranks)[0, 1].item(), rel=1e-3)


def test_figures_of_pairs_against_brute_force(scored, make_trainer):
    module, raw = scored
    differences = [raw(c) - raw(r) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    metrics = make_trainer().validate(module, loader([pairs(slice(0, 1)), pairs(slice(1, 3))]), verbose=False)[0]
    right = [d > 0 for d in differences]
    assert metrics["val/agreement"] == pytest.approx(sum(right) / 3)
    assert metrics["val/agreement_gap_1"] == pytest.approx(sum(right[1:]) / 2)  # margins 1.5 and 2.5
    assert metrics["val/agreement_gap_2"] == pytest.approx(float(right[2]))
    losses = [-log_sigmoid(d - m) for d, m in zip(differences, MARGINS, strict=True)]
    assert metrics["val/loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    p = [1 / (1 + math.exp(-d)) for d in differences]
    assert metrics["val/calibration_error"] == pytest.approx(brute_calibration(p, [1, 1, 1]), rel=1e-4)
    assert metrics["val/raw_mean"] == pytest.approx(sum(map(raw, CHOSEN + REJECTED)) / 6, rel=1e-4)


def test_gaps_are_those_asked_for(reward, make_trainer):
    metrics = make_trainer().validate(reward(gaps=(0.5,)), loader([rated()]), verbose=False)[0]
    assert {k for k in metrics if "agreement" in k and "length" not in k} == {"val/agreement", "val/agreement_gap_0_5"}


def test_training_logs_agreement_and_loss(scored, fit):
    module, raw = scored
    module.hparams.learning_rate = 0.0
    fit(module, [pairs()])
    right = [raw(c) > raw(r) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    assert module.trainer.callback_metrics["train/agreement"] == pytest.approx(sum(right) / 3)
    assert "train/loss" in module.trainer.callback_metrics


def test_training_reports_margin_and_raw_scores_over_unequal_batches(scored, fit):
    module, raw = scored
    module.hparams.learning_rate = 0.0
    differences = [raw(c) - raw(r) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    scores = [raw(ids) for ids in CHOSEN + REJECTED]
    fit(module, [pairs(slice(0, 2)), pairs(slice(2, 3))])
    metrics = module.trainer.callback_metrics
    assert metrics["train/margin"].item() == pytest.approx(sum(differences) / 3, rel=1e-4)
    assert metrics["train/raw_mean"].item() == pytest.approx(sum(scores) / 6, rel=1e-4)
    assert metrics["train/raw_min"].item() == pytest.approx(min(scores), rel=1e-4)
    assert metrics["train/raw_max"].item() == pytest.approx(max(scores), rel=1e-4)


def test_sources_change_no_weight(reward, fit, make_trainer):
    ends = []
    for columns in ({}, {"source": ["a", "b", "a"]}):
        torch.manual_seed(0)
        module = reward()
        batch = pairs() | columns
        make_trainer(max_epochs=2).fit(module, loader([batch] * 2), loader([batch]))
        assert ("val/agreement/a" in module.trainer.callback_metrics) == bool(columns)
        ends.append({name: p.clone() for name, p in module.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# --- the normaliser -----------------------------------------------------------------------------------------------


def validated(module, make_trainer, batches=None, **trainer):
    made = make_trainer(max_epochs=1, **trainer)
    made.fit(module, loader([pairs()] * 3), loader(batches or [rated(slice(0, 2)), rated(slice(2, 5))]))
    return module


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}, {"dtype": "bfloat16"}], ids=str)
def test_validation_texts_have_mean_0_and_deviation_1_afterwards(reward, make_trainer, options):
    module = validated(reward(**options), make_trainer)
    with torch.no_grad():
        scores = torch.cat([module(rated(w)) for w in (slice(0, 2), slice(2, 5))]).double()
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert (module.network.mean, module.network.std) != (0.0, 1.0)


def test_the_normaliser_is_fitted_anew_at_every_validation(reward, make_trainer):
    module = reward()
    seen = []
    trainer = make_trainer(max_epochs=3, num_sanity_val_steps=1)

    def look():
        with torch.no_grad():
            raw = module.network.raw(**padded(TEXTS)).double()
        seen.append((raw.mean().item(), raw.std(correction=0).item()))
        assert (module.network.mean, module.network.std) == pytest.approx(seen[-1], rel=1e-5)

    module.on_train_epoch_end = look  # after the epoch's validation
    trainer.fit(module, loader([pairs()]), loader([rated()]))
    assert len(set(seen)) == 3


def test_equal_scores_are_not_divided_by_0(reward, make_trainer):
    module = reward()
    module.configure_model()
    torch.nn.init.zeros_(module.network.head.weight)
    make_trainer().validate(module, loader([pairs()]), verbose=False)
    assert (module.network.mean, module.network.std) == (0.0, 1.0)


def test_test_texts_do_not_touch_the_normaliser(reward, make_trainer):
    module = reward()
    make_trainer().test(module, loader([rated()]), verbose=False)
    assert (module.network.mean, module.network.std) == (0.0, 1.0)


def test_without_validation_there_is_no_normaliser(reward, fit):
    module = fit(reward(), [pairs()])
    assert (module.network.mean, module.network.std) == (0.0, 1.0)


# --- saving and loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_saved_and_loaded_models_give_the_same_scores(reward, make_trainer, tmp_path, options):
    module = validated(reward(**options), make_trainer)
    batch = padded(TEXTS)
    with torch.no_grad():
        expected = module(batch)
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    module.save_pretrained(tmp_path / "folder")

    from_checkpoint = RewardModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    from_folder = RewardModule(str(tmp_path / "folder"))
    from_folder.configure_model()
    for loaded in (from_checkpoint, from_folder):
        assert (loaded.network.mean, loaded.network.std) == (module.network.mean, module.network.std)
        with torch.no_grad():
            torch.testing.assert_close(loaded(batch), expected)

    texts = ["\1\2\3", "\4\5", "\6"]  # the reward's own reading: text + EOS
    with torch.no_grad():
        expected = module(padded([[1, 2, 3, 0], [4, 5, 0], [6, 0]]))
    for spec in (str(tmp_path / "a.ckpt"), str(tmp_path / "folder"), module):
        scores = ModelReward(spec)(Responses(texts, ["", "", ""]))
        torch.testing.assert_close(scores, expected)


def test_an_exported_model_is_one_of_hugging_face(reward, make_trainer, tmp_path):
    module = validated(reward(lora_r=4), make_trainer)
    module.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        for ids in TEXTS:
            raw = loaded(torch.tensor([[*ids[:-1], 7]])).logits[0, 0]
            expected = module.network.raw(**padded([[*ids[:-1], 7]]))[0]
            torch.testing.assert_close(raw, expected)
    assert loaded.config.reward_mean == module.network.mean


def test_lora_checkpoints_hold_adapters_and_head_only(reward, fit, tmp_path):
    module = fit(reward(lora_r=4), [pairs()])
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    names = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"].keys()
    assert len(names) == 1 + 2 * 2 * 7
    assert sum("lora_" in name for name in names) == 2 * 2 * 7
    assert sum(name.endswith("score.weight") for name in names) == 1


def test_the_backbone_under_an_adapter_does_not_move_by_a_bit(reward, fit, policy):
    module = reward(lora_r=4, learning_rate=0.1)
    module.configure_model()
    before = {n: p.clone() for n, p in module.named_parameters()}
    fit(module, [pairs()] * 3)
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n or n.endswith("score.weight")}


def test_predictions_are_texts_and_normalised_scores(reward, make_trainer):
    module = validated(reward(), make_trainer)
    batch = padded(TEXTS)
    found = make_trainer().predict(module, loader([batch]))[0]
    assert found["text"] == ["\1\2", "\3", "\4\5\6\7", "\2\2\2", "\6\1"]
    assert sum(found["score"]) / 5 == pytest.approx(0, abs=1e-5)


def test_validation_disturbs_no_weight(reward, make_trainer):
    ends = []
    for share_of_batches in (0, 1.0):
        torch.manual_seed(0)
        module = validated(reward(), make_trainer, limit_val_batches=share_of_batches)
        ends.append({name: p.clone() for name, p in module.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
