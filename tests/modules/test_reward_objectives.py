"""What reward models may learn: rankings, ratings by regression, ratings as levels; saved, resumed, exported."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from lightning_rlhf.export import export
from lightning_rlhf.functional import ordered_thresholds
from lightning_rlhf.modules import RewardModule
from lightning_rlhf.modules.reward_models import ModelReward
from lightning_rlhf.modules.reward_objectives import (
    OrdinalRatings,
    Preferences,
    RatingRegression,
    RewardObjective,
    compare,
    lists,
)
from lightning_rlhf.modules.reward_terms import Responses
from lightning_rlhf.train import main

TEXTS = [[1, 2, 0], [3, 0], [4, 5, 6, 7, 0], [2, 2, 2, 0], [6, 1, 0], [5, 0]]
RATINGS = [[0, 2], [2], [4, 4, 3], [2, 2], [4, 0], [1]]
LEVELS = [0, 1, 2, 3, 4]
LISTS = [[0, 1, 2], [3, 4], [5, 0, 1, 2]]  # texts of each list
RANKS = [[2, 1, 3], [1, 2], [1, 2, 2, 4]]


def padded(rows, extra=0, garbage=0):
    width = max(map(len, rows)) + extra
    return {
        "input_ids": torch.tensor([[*r, *[garbage] * (width - len(r))] for r in rows]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]),
    }


def rated(which=slice(None), **options):
    rows = RATINGS[which]
    width = max(map(len, rows))
    return padded(TEXTS[which], **options) | {
        "ratings": torch.tensor([[*map(float, r), *[99.0] * (width - len(r))] for r in rows]),
        "ratings_mask": torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in rows]),
    }


def ranked(which=slice(None), **options):
    chosen, ranks = LISTS[which], RANKS[which]
    return padded([TEXTS[i] for one in chosen for i in one], **options) | {
        "group": torch.tensor([number for number, one in enumerate(chosen) for _ in one]),
        "rank": torch.tensor([float(rank) for one in ranks for rank in one]),
    }


def loader(batches):
    return DataLoader(batches, batch_size=None)


def regression():
    return RatingRegression(center=2, scale=1.5)


def ordinal(**options):
    return OrdinalRatings(LEVELS, **options)


OBJECTIVES = {"rankings": (Preferences, ranked), "regression": (regression, rated), "ordinal": (ordinal, rated)}


@pytest.fixture
def reward(reward_folder):
    def make(objective=None, model=reward_folder, **options):
        return RewardModule(model, objective=objective, **(dict(learning_rate=1e-2, lr_scheduler="constant") | options))

    return make


@pytest.fixture
def raw(reward):
    """The raw scores of the texts, one by one."""
    module = reward()
    module.configure_model()
    with torch.no_grad():
        hidden = [
            module.network.model.model(torch.tensor([t]), use_cache=False).last_hidden_state[0, -1] for t in TEXTS
        ]
        return [float(h.double() @ module.network.head.weight[0].double()) for h in hidden]


def first_loss(module, batch):
    module.log = module.log_mean = lambda *_, **__: None
    module.configure_model()
    return module.training_step(batch, 0).item()


def sigma(x):
    return 1 / (1 + math.exp(-x))


def slow_rankings(raw):
    """Efron's sums, item by item."""
    loss = 0.0
    for one, ranks in zip(LISTS, RANKS, strict=True):
        for place, (i, rank) in enumerate(zip(one, ranks, strict=True)):
            below = [math.exp(raw[j]) for j, other in zip(one, ranks, strict=True) if other >= rank]
            tied = [math.exp(raw[j]) for j, other in zip(one, ranks, strict=True) if other == rank]
            gone = sum(other == rank for other in ranks[:place]) / len(tied)
            loss += math.log(sum(below) - gone * sum(tied)) - raw[i]
    return loss


def slow_ordinal(raw, thresholds):
    loss = 0.0
    for score, own in zip(raw, RATINGS, strict=True):
        at_most = [0.0, *[sigma(b - score) for b in thresholds], 1.0]
        loss -= sum(math.log(at_most[r + 1] - at_most[r]) for r in own) / len(own)
    return loss


EVEN = [math.log(p / (1 - p)) for p in (0.2, 0.4, 0.6, 0.8)]


# --- the losses -------------------------------------------------------------------------------------------------------


def test_pairs_of_a_batch():
    raw = torch.tensor([1.0, 4.0, 2.0, 0.0, 5.0])
    batch = {"margin": torch.tensor([0.5, 2.0])}
    given = compare(raw[:4], batch)
    assert [field.tolist() for field in given] == [[-1, 4], [1, 1], [0.5, 2], [0.5, 2], [0, 1]]
    assert compare(raw[:4], batch | {"preference": torch.tensor([0.75, 0.5])}).preference.tolist() == [0.75, 0.5]
    ranking = {"group": torch.tensor([0, 0, 0, 1, 1]), "rank": torch.tensor([2.0, 1.0, 2.0, 4.0, 1.0])}
    found = compare(raw, ranking)
    assert [field.tolist() for field in found] == [[3, 2, 5], [1, 1, 1], [0, 0, 0], [1, 1, 3], [0, 0, 1]]
    rated = {"ratings": torch.tensor([[1.0], [2.0], [2.0]]), "ratings_mask": torch.ones(3, 1, dtype=torch.bool)}
    assert compare(raw[:3], rated).row.tolist() == [0, 0, 1]


def test_agreement_of_pairs():
    batch = {"margin": torch.zeros(4), "preference": torch.tensor([0.9, 0.2, 0.5, 1.0])}
    pairs = compare(torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]), batch)
    assert pairs.agreement.tolist() == [1, 0, 0.5, 0.5]
    assert pairs.lead.tolist() == [2, -2, 0, 0]
    assert pairs.decided.tolist() == [True, True, False, True]


def test_lists_become_rows():
    values, mask = lists(torch.tensor([0, 0, 0, 1, 2, 2]), torch.arange(6.0))
    assert values.tolist() == [[0, 1, 2], [3, 0, 0], [4, 5, 0]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]


def test_soft_pairs_are_learned_with_their_share(reward, raw):
    batch = padded(TEXTS[:4]) | {"margin": torch.tensor([0.3, 0.0]), "preference": torch.tensor([0.7, 0.2])}
    expected = 0.0
    for i, (p, margin) in enumerate([(0.7, 0.3), (0.2, 0.0)]):
        d = raw[i] - raw[i + 2] - margin
        expected -= p * math.log(sigma(d)) + (1 - p) * math.log(sigma(-d))
    assert first_loss(reward(), batch) == pytest.approx(expected, rel=1e-5)


def test_loss_of_rankings(reward, raw):
    assert first_loss(reward(), ranked()) == pytest.approx(slow_rankings(raw), rel=1e-5)


@pytest.mark.parametrize(("center", "scale"), [(0.0, 1.0), (2.0, 1.0), (0.0, 2.5)])
def test_loss_of_regression(reward, raw, center, scale):
    expected = sum((s - (sum(r) / len(r) - center) / scale) ** 2 for s, r in zip(raw, RATINGS, strict=True))
    assert first_loss(reward(RatingRegression(center, scale)), rated()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("thresholds", [None, [-3.0, -1.0, 0.5, 0.6]])
def test_loss_of_levels(reward, raw, thresholds):
    found = first_loss(reward(ordinal(thresholds=thresholds)), rated())
    assert found == pytest.approx(slow_ordinal(raw, thresholds or EVEN), rel=1e-5)


def test_thresholds_start_where_all_levels_are_as_probable():
    found = ordinal()(torch.zeros(6), rated())
    torch.testing.assert_close(found.levels.probabilities, torch.full((6, 5), 0.2))
    assert found.losses.tolist() == pytest.approx([math.log(5)] * 6)


def test_levels_are_what_the_data_says_not_their_number():
    halves = rated()
    halves["ratings"] = halves["ratings"] / 2 - 1
    found = OrdinalRatings([-1, -0.5, 0, 0.5, 1])(torch.arange(6.0), halves)
    torch.testing.assert_close(found.losses, ordinal()(torch.arange(6.0), rated()).losses)


def test_an_objective_of_ones_own(reward, raw):
    class Hinge(RewardObjective):
        def forward(self, raw, batch):
            pairs = compare(raw, batch)
            return Preferences()(raw, batch)._replace(losses=(1 - pairs.difference).clamp(min=0))

    expected = sum(
        max(0, 1 - raw[one[a]] + raw[one[b]])
        for one, ranks in zip(LISTS, RANKS, strict=True)
        for a in range(len(one))
        for b in range(len(one))
        if ranks[a] < ranks[b]
    )
    assert first_loss(reward(Hinge()), ranked()) == pytest.approx(expected, rel=1e-5)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulation_and_padding_change_no_gradient(reward, fit, new_gradients, name, options):
    make, batch = OBJECTIVES[name]
    ways = [
        ([batch()], 1),
        ([batch(slice(0, 1)), batch(slice(1, None))], 2),
        ([batch(slice(0, 1)), batch(slice(1, 2)), batch(slice(2, None))], 3),
        ([batch(extra=4, garbage=6)], 1),
    ]
    found = []
    for batches, accumulate in ways:
        torch.manual_seed(0)
        watch = new_gradients()
        fit(reward(make(), **options), batches, callbacks=[watch], accumulate_grad_batches=accumulate)
        assert len(watch.steps) == 1
        found.append(watch.steps[0])
    assert ("objective.free" in found[0]) == (name == "ordinal")
    for gradients in found[1:]:
        assert gradients.keys() == found[0].keys()
        for parameter, gradient in found[0].items():
            torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_the_loss_is_a_mean_over_lists_or_texts(reward, fit, raw, options):
    for make, batch, total, count in (
        (Preferences, ranked, slow_rankings(raw), 3),
        (ordinal, rated, slow_ordinal(raw, EVEN), 6),
    ):
        torch.manual_seed(0)
        module = fit(reward(make(), learning_rate=0.0, **options), [batch()])
        found = module.trainer.callback_metrics["train/loss"].item()
        assert found == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_tiny_batch_is_learned_by_heart(reward, fit, name):
    make, batch = OBJECTIVES[name]
    module = fit(reward(make(**({"learning_rate": 0.1} if name == "ordinal" else {}))), [batch()] * 60)
    with torch.no_grad():
        scores = module.network.raw(**padded(TEXTS))
    if name == "rankings":
        orders = [[5, 0, 2], [5, 1, 2], [1, 0, 2], [3, 4]]  # 0 and 1 are tied below 5, 1 is above 0 elsewhere
        assert all(scores[a] > scores[b] for order in orders for a, b in pairwise(order))
    elif name == "regression":
        ratings = 2 + 1.5 * scores
        torch.testing.assert_close(ratings, torch.tensor([sum(r) / len(r) for r in RATINGS]), atol=0.2, rtol=0)
    else:
        judged = module.objective(scores, rated())
        assert judged.levels.probabilities.argmax(1)[[1, 2, 3]].tolist() == [2, 4, 2]  # rated by all alike, or nearly
        assert scores[5] < scores[3] < scores[2]


def test_thresholds_are_trained_at_their_own_rate_and_do_not_decay(reward, fit):
    moved = []
    for rate in (None, 0.0, 0.1):
        torch.manual_seed(0)
        objective = ordinal(learning_rate=rate)
        before = objective.free.detach().clone()
        module = fit(reward(objective, weight_decay=0.5), [rated()])
        groups = {group["name"]: group for group in module.trainer.optimizers[0].param_groups}
        assert groups["network"]["weight_decay"] == 0.5
        assert groups["objective"]["weight_decay"] == 0
        assert groups["objective"]["lr"] == (1e-2 if rate is None else rate)
        assert sum(p.numel() for group in groups.values() for p in group["params"]) == sum(
            p.numel() for p in module.parameters()
        )
        moved.append((module.objective.free - before).abs().max().item())
    assert moved == pytest.approx([1e-2, 0.0, 0.1], rel=1e-3)  # the first step of Adam is the learning rate


def test_without_parameters_there_is_one_group(reward, fit):
    for objective in (None, regression()):
        batch = rated()
        assert len(fit(reward(objective), [batch]).trainer.optimizers[0].param_groups) == 1


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_resuming_is_bit_for_bit(reward, fit, tmp_path, name, options):
    make, batch = OBJECTIVES[name]
    batches = [batch(slice(0, 2)), batch(slice(1, 3))]
    torch.manual_seed(0)
    whole = fit(reward(make(), **options), batches, max_epochs=3)
    torch.manual_seed(0)
    fit(reward(make(), **options), batches).trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(0)
    resumed = fit(reward(make(), **options), batches, max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    for (key, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), key


# --- saving and loading -----------------------------------------------------------------------------------------------


def thresholds(module):
    return ordered_thresholds(module.objective.free).tolist()


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_thresholds_survive_checkpoint_and_export(reward, fit, tmp_path, options):
    module = fit(reward(ordinal(learning_rate=0.3), **options), [rated()] * 3)
    assert thresholds(module) != pytest.approx(EVEN, abs=0.1)
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    module.save_pretrained(tmp_path / "folder")
    settings = json.loads((tmp_path / "folder/config.json").read_text())["reward_objective"]
    assert settings["class"] == "OrdinalRatings"
    assert settings["levels"] == LEVELS
    assert settings["thresholds"] == pytest.approx(thresholds(module), rel=1e-6)

    loaded = RewardModule.load_from_checkpoint(tmp_path / "a.ckpt", objective=ordinal(), weights_only=True)
    assert torch.equal(loaded.objective.free, module.objective.free)
    again = reward(ordinal(), model=str(tmp_path / "folder"))
    again.configure_model()
    assert thresholds(again) == pytest.approx(thresholds(module), rel=1e-6)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "folder").config.reward_objective == settings
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["reward_objective"]["thresholds"] == pytest.approx(
        settings["thresholds"], rel=1e-6
    )


def test_thresholds_are_in_an_adapters_folder_too(reward, fit, tmp_path):
    module = fit(reward(ordinal(learning_rate=0.3), lora_r=4), [rated()] * 3)
    module.save_pretrained(tmp_path, merge=False)
    assert not (tmp_path / "config.json").exists()
    again = reward(ordinal(), model=str(tmp_path))
    again.configure_model()
    assert thresholds(again) == pytest.approx(thresholds(module), rel=1e-6)


@pytest.mark.parametrize("lora", ["merged", "adapter"])
def test_the_export_command_writes_the_thresholds(reward, fit, tmp_path, lora):
    module = fit(reward(ordinal(learning_rate=0.3), lora_r=4), [rated()] * 3)
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    export(str(tmp_path / "a.ckpt"), str(tmp_path / "folder"), lora=lora)
    again = reward(ordinal(), model=str(tmp_path / "folder"))
    again.configure_model()
    assert thresholds(again) == pytest.approx(thresholds(module), rel=1e-6)


def test_given_thresholds_and_other_levels_start_anew(reward, fit, tmp_path):
    fit(reward(ordinal(thresholds=[-2.0, 0.0, 1.0, 2.0])), [rated()]).save_pretrained(tmp_path)
    for objective, expected in (
        (ordinal(thresholds=[-1.0, 0.0, 1.0, 3.0]), [-1.0, 0.0, 1.0, 3.0]),
        (OrdinalRatings([1, 2, 3, 4, 5]), EVEN),
    ):
        module = reward(objective, model=str(tmp_path))
        module.configure_model()
        assert thresholds(module) == pytest.approx(expected, abs=1e-5)


def test_scores_need_no_objective(reward, fit, tmp_path):
    module = fit(reward(ordinal()), [rated()])
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = RewardModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert isinstance(loaded.objective, Preferences)
    with torch.no_grad():
        torch.testing.assert_close(loaded(padded(TEXTS)), module(padded(TEXTS)))
        expected = module(padded([[1, 2, 0]]))
    torch.testing.assert_close(ModelReward(str(tmp_path / "a.ckpt"))(Responses(["\1"], ["\2"])), expected)
    loaded.save_pretrained(tmp_path / "folder")  # its thresholds are those of the training
    settings = json.loads((tmp_path / "folder/config.json").read_text())["reward_objective"]
    assert settings["thresholds"] == pytest.approx(thresholds(module), rel=1e-6)


def test_a_training_by_another_objective_leaves_no_old_settings(reward, fit, tmp_path):
    fit(reward(ordinal()), [rated()]).save_pretrained(tmp_path / "first")
    assert "reward_objective" in json.loads((tmp_path / "first/config.json").read_text())
    fit(reward(model=str(tmp_path / "first")), [rated()]).save_pretrained(tmp_path / "second")
    assert "reward_objective" not in json.loads((tmp_path / "second/config.json").read_text())
    fit(reward(regression(), model=str(tmp_path / "first")), [rated()]).save_pretrained(tmp_path / "third")
    found = json.loads((tmp_path / "third/config.json").read_text())["reward_objective"]
    assert found == {"class": "RatingRegression", "center": 2.0, "scale": 1.5}


def test_resuming_without_the_objective_is_refused(reward, fit, tmp_path):
    fit(reward(ordinal()), [rated()]).trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="`objective`: the checkpoint was trained with one that has parameters"):
        fit(reward(regression()), [rated()], max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    fit(reward(), [rated()]).trainer.save_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"1 of its trained tensors are not in the file, such as `objective.free`"):
        fit(reward(ordinal()), [rated()], max_epochs=2, ckpt_path=tmp_path / "b.ckpt")


def test_checkpoints_hold_the_thresholds_and_what_is_trained(reward, fit, tmp_path):
    fit(reward(ordinal(), lora_r=4), [rated()]).trainer.save_checkpoint(tmp_path / "a.ckpt")
    names = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"].keys()
    assert {name for name in names if "lora_" not in name and "score" not in name} == {"objective.free"}


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`levels` must be at least two numbers that increase, but got \[1\]"):
        OrdinalRatings([1])
    with pytest.raises(ValueError, match="`levels` must be at least two numbers that increase"):
        OrdinalRatings([1, 3, 2])
    with pytest.raises(ValueError, match=r"`thresholds` must be 2 numbers, but got \[0\]"):
        OrdinalRatings([1, 2, 3], thresholds=[0])
    with pytest.raises(ValueError, match=r"`thresholds` must increase by more than 0.001, but are \[1.0, 0.0\]"):
        OrdinalRatings([1, 2, 3], thresholds=[1, 0])
    with pytest.raises(ValueError, match="`scale` must be above 0, but got 0"):
        RatingRegression(scale=0)


@pytest.mark.parametrize("make", [ordinal, regression])
def test_ratings_are_needed(reward, fit, make):
    with pytest.raises(ValueError, match=r"learns from ratings, but the batch holds \['attention_mask', 'group'"):
        fit(reward(make()), [ranked()])


def test_a_rating_that_is_no_level_is_refused(reward, fit):
    message = r"among the levels \[0.0, 1.0, 2.0, 3.0\], but text 2 of the batch .* has the rating 4"
    with pytest.raises(ValueError, match=message):
        fit(reward(OrdinalRatings([0, 1, 2, 3])), [rated()])


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def fit_from_the_command_line(policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])

    def run(rows, *flags):
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        quiet = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false", "--trainer.max_epochs=1"]
        quiet += ["--trainer.default_root_dir=run", "--trainer.log_every_n_steps=1"]
        model = ["--model=RewardModule", f"--model.model={policy}"]
        return main(["fit", *quiet, *model, *flags, "--data.data=rows.jsonl", "--data.val_data=rows.jsonl"])

    return run


def test_the_command_line_knows_the_objectives_by_name(fit_from_the_command_line):
    rows = [{"text": "\1" * (i + 1), "ratings": [i, 2]} for i in range(4)]
    objective = ["--model.objective=OrdinalRatings", "--model.objective.levels=[0,1,2,3]"]
    cli = fit_from_the_command_line(rows, *objective, "--data=RatingDataModule")
    assert cli.model.objective.levels == [0, 1, 2, 3]
    assert cli.trainer.callback_metrics["val/level_calibration_error"] > 0
    assert len(json.loads(Path("run/model/config.json").read_text())["reward_objective"]["thresholds"]) == 3
    assert "objective" not in torch.load("run/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]


def test_the_command_line_trains_on_rankings(fit_from_the_command_line):
    rows = [{"prompt": "\1", "answers": [{"answer": "\2" * k, "rank": k} for k in range(1, 4 + i)]} for i in range(3)]
    fields = ["--data.responses_column=answers", "--data.response_field=answer", "--data.rank_field=rank"]
    cli = fit_from_the_command_line(rows, "--data=RankingDataModule", *fields)
    assert cli.trainer.callback_metrics["val/agreement_length_baseline"] == 0  # the shortest is best
    assert cli.trainer.callback_metrics["train/loss"] > 0
