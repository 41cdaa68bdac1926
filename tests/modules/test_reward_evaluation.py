"""What is reported of held-out texts, against brute force: rankings, soft pairs, levels, and how much is length."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_rlhf.modules import RewardModule
from lightning_rlhf.modules.reward_objectives import OrdinalRatings, RatingRegression

TEXTS = [[1, 2, 0], [3, 0], [4, 5, 6, 7, 0], [2, 2, 2, 0], [6, 1, 0], [5, 0], [7, 7, 1, 2, 3, 0]]
TEXTS += [[1, 1, 4, 0], [6, 6, 0]]
RATINGS = [[0, 2], [2], [4, 4, 3], [2, 2], [4, 0], [1], [3], [3, 1], [0]]
LISTS = [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
RANKS = [[2, 1, 4], [1, 2], [1, 2, 2, 4]]
PAIRS = [(0, 1, 0.0, 0.75), (2, 3, 1.5, 1.0), (4, 7, 2.5, 0.2), (6, 5, 2.5, 0.5)]  # i, j, margin, share who prefer i


def padded(rows):
    width = max(map(len, rows)) + 1
    return {
        "input_ids": torch.tensor([[*r, *[5] * (width - len(r))] for r in rows]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]),
    }


def rated(which):
    rows = RATINGS[which]
    width = max(map(len, rows))
    return padded(TEXTS[which]) | {
        "ratings": torch.tensor([[*map(float, r), *[99.0] * (width - len(r))] for r in rows]),
        "ratings_mask": torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in rows]),
    }


def ranked(which):
    return padded([TEXTS[i] for one in LISTS[which] for i in one]) | {
        "group": torch.tensor([number for number, one in enumerate(LISTS[which]) for _ in one]),
        "rank": torch.tensor([float(rank) for one in RANKS[which] for rank in one]),
    }


def pairs(which):
    i, j, margin, preference = zip(*PAIRS[which], strict=True)
    return padded([TEXTS[k] for k in i + j]) | {
        "margin": torch.tensor(margin),
        "preference": torch.tensor(preference),
    }


BATCHES = {kind: [kind(slice(0, 2)), kind(slice(2, None))] for kind in (rated, ranked, pairs)}
ORDERED = [  # (better, worse, by how many ranks)
    (one[a], one[b], ranks[b] - ranks[a])
    for one, ranks in zip(LISTS, RANKS, strict=True)
    for a in range(len(one))
    for b in range(len(one))
    if ranks[a] < ranks[b]
]


def evaluated(module, make_trainer, kind, stage="val"):
    """Its metrics, and the raw scores of the texts."""
    trainer = make_trainer()
    evaluate = trainer.validate if stage == "val" else trainer.test
    metrics = evaluate(module, DataLoader(BATCHES[kind], batch_size=None), verbose=False)[0]
    with torch.no_grad():
        scores = [module.network.raw(**padded([text]))[0].item() for text in TEXTS]
    return {name.removeprefix(f"{stage}/"): value for name, value in metrics.items()}, scores


def wins(a, b):
    return (a > b) + 0.5 * (a == b)


def average(values):
    values = list(values)
    return sum(values) / len(values)


def ranks_of(values):
    """From 1, ties at the mean of their places."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def spearman(x, y):
    return torch.corrcoef(torch.tensor([ranks_of(x), ranks_of(y)], dtype=torch.float64))[0, 1].item()


def bins_of(predictions):
    """Per tenth: how many, mean probability, mean label."""
    bins = {}
    for p, y in predictions:
        bins.setdefault(min(int(p * 10), 9), []).append((p, y))
    return {k: (len(v), average(p for p, _ in v), average(y for _, y in v)) for k, v in bins.items()}


def calibration(predictions):
    return sum(n * abs(p - y) for n, p, y in bins_of(predictions).values()) / len(predictions)


def both_orders(predictions):
    return [*predictions, *[(1 - p, 1 - y) for p, y in predictions]]


def sigma(x):
    return 1 / (1 + math.exp(-x))


def length(i):
    return len(TEXTS[i])


@pytest.mark.parametrize("stage", ["val", "test"])
def test_figures_of_rankings(reward_folder, make_trainer, stage):
    found, s = evaluated(RewardModule(reward_folder), make_trainer, ranked, stage)
    for name, gap in (("agreement", 0), ("agreement_gap_1", 1), ("agreement_gap_2", 2)):
        assert found[name] == pytest.approx(average(wins(s[i], s[j]) for i, j, by in ORDERED if by > gap)), name
    assert found["agreement_length_baseline"] == pytest.approx(
        average(wins(length(i), length(j)) for i, j, _ in ORDERED)
    )
    assert found["calibration_error"] == pytest.approx(
        calibration(both_orders([(sigma(s[i] - s[j]), 1.0) for i, j, _ in ORDERED])), rel=1e-5
    )
    texts = [i for one in LISTS for i in one]
    # Texts that are in two lists tie with themselves; their scores differ by rounding in batches of other widths.
    assert found["length_correlation"] == pytest.approx(
        spearman([s[i] for i in texts], [*map(length, texts)]), abs=0.02
    )
    known = {"loss", "calibration_error", "length_correlation", "agreement_length_baseline"}
    known |= {"agreement", "agreement_gap_1", "agreement_gap_2", "margin", "raw_min", "raw_max"}
    assert found["margin"] == pytest.approx(average(s[i] - s[j] for i, j, _ in ORDERED), rel=1e-4)
    assert [found["raw_min"], found["raw_max"]] == pytest.approx([min(s), max(s)], rel=1e-5)
    assert found.keys() == known | ({"raw_mean", "raw_std"} if stage == "val" else set())


def test_loss_of_rankings_is_a_mean_over_lists(reward_folder, make_trainer):
    found, s = evaluated(RewardModule(reward_folder), make_trainer, ranked)
    losses = []
    for one, ranks in zip(LISTS, RANKS, strict=True):
        left = list(zip(one, ranks, strict=True))
        for rank in sorted(set(ranks)):
            tied = [i for i, r in left if r == rank]
            everyone, own = (sum(math.exp(s[i]) for i in some) for some in ([i for i, _ in left], tied))
            losses += [math.log(everyone - k / len(tied) * own) - s[i] for k, i in enumerate(tied)]
            left = [(i, r) for i, r in left if r != rank]
    assert found["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_figures_of_soft_pairs(reward_folder, make_trainer):
    found, s = evaluated(RewardModule(reward_folder), make_trainer, pairs)
    decided = [(i, j, margin) if p > 0.5 else (j, i, margin) for i, j, margin, p in PAIRS if p != 0.5]
    for name, gap in (("agreement", -1), ("agreement_gap_1", 1), ("agreement_gap_2", 2)):
        assert found[name] == pytest.approx(average(wins(s[i], s[j]) for i, j, by in decided if by > gap)), name
    assert found["agreement_length_baseline"] == pytest.approx(
        average(wins(length(i), length(j)) for i, j, _ in decided)
    )
    assert found["margin"] == pytest.approx(average(s[i] - s[j] for i, j, _ in decided), rel=1e-4)
    predictions = [(sigma(s[i] - s[j]), p) for i, j, _, p in PAIRS]
    assert found["calibration_error"] == pytest.approx(calibration(both_orders(predictions)), rel=1e-5)
    texts = [i for pair in PAIRS for i in pair[:2]]
    assert found["length_correlation"] == pytest.approx(
        spearman([s[i] for i in texts], [*map(length, texts)]), abs=0.02
    )
    differences = [(s[i] - s[j] - margin, p) for i, j, margin, p in PAIRS]
    losses = [-p * math.log(sigma(d)) - (1 - p) * math.log(sigma(-d)) for d, p in differences]
    assert found["loss"] == pytest.approx(average(losses), rel=1e-5)


OBJECTIVES = {
    "pairs": lambda: None,
    "regression": lambda: RatingRegression(2, 1.5),
    "ordinal": lambda: OrdinalRatings([0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_figures_of_ratings_are_the_same_for_every_objective(reward_folder, make_trainer, name):
    found, s = evaluated(RewardModule(reward_folder, objective=OBJECTIVES[name]()), make_trainer, rated)
    means = [average(r) for r in RATINGS]
    better = [(i, j) for i in range(9) for j in range(9) if means[i] > means[j]]  # over batches, too
    assert found["agreement"] == pytest.approx(average(wins(s[i], s[j]) for i, j in better))
    assert found["agreement_length_baseline"] == pytest.approx(average(wins(length(i), length(j)) for i, j in better))
    assert found["length_correlation"] == pytest.approx(spearman(s, [*map(length, range(9))]), rel=1e-4)
    assert found["margin"] == pytest.approx(average(s[i] - s[j] for i, j in better), rel=1e-4)
    assert found["spearman"] == pytest.approx(spearman(s, means), rel=1e-4)
    assert found["pearson"] == pytest.approx(torch.corrcoef(torch.tensor([s, means]))[0, 1].item(), rel=1e-3)
    compared = [(0, 1), *((i, j) for i in range(2, 9) for j in range(i + 1, 9))]
    share = {(i, j): average(wins(a, b) for a in RATINGS[i] for b in RATINGS[j]) for i, j in compared}
    predictions = [(sigma(s[i] - s[j]), share[i, j]) for i, j in compared]
    assert found["calibration_error"] == pytest.approx(calibration(both_orders(predictions)), rel=1e-5)
    losses = {
        "pairs": [-y * math.log(p) - (1 - y) * math.log(1 - p) for p, y in predictions],
        "regression": [(score - (mean - 2) / 1.5) ** 2 for score, mean in zip(s, means, strict=True)],
        "ordinal": [
            -average(math.log(levels_of(score)[r]) for r in own) for score, own in zip(s, RATINGS, strict=True)
        ],
    }
    assert found["loss"] == pytest.approx(average(losses[name]), rel=1e-5)
    assert ("level_calibration_error" in found) == (name == "ordinal")


def levels_of(score):
    """Probabilities of the five levels before any training."""
    at_most = [0.0, *[sigma(math.log(p / (1 - p)) - score) for p in (0.2, 0.4, 0.6, 0.8)], 1.0]
    return [at_most[k + 1] - at_most[k] for k in range(5)]


def test_calibration_of_levels(reward_folder, make_trainer):
    module = RewardModule(reward_folder, objective=OBJECTIVES["ordinal"]())
    found, s = evaluated(module, make_trainer, rated)
    predictions = [
        (p, own.count(k) / len(own))
        for score, own in zip(s, RATINGS, strict=True)
        for k, p in enumerate(levels_of(score))
    ]
    assert found["level_calibration_error"] == pytest.approx(calibration(predictions), rel=1e-5)
    assert module.reliability.keys() == {"pairs", "levels"}
    assert_reliability(module.reliability["levels"], predictions)


def test_reliability_is_there_after_an_evaluation(reward_folder, make_trainer):
    module = RewardModule(reward_folder)
    _, s = evaluated(module, make_trainer, ranked)
    predictions = both_orders([(sigma(s[i] - s[j]), 1.0) for i, j, _ in ORDERED])
    assert module.reliability.keys() == {"pairs"}
    assert_reliability(module.reliability["pairs"], predictions)
    assert RewardModule(reward_folder).reliability == {}


def assert_reliability(found, predictions):
    expected = bins_of(predictions)
    for k, row in enumerate(found.tolist()):
        if k in expected:
            assert row == pytest.approx(expected[k], rel=1e-5)
        else:
            assert row[0] == 0


def test_a_model_that_only_counts_tokens_is_seen_through(reward_folder, make_trainer):
    module = RewardModule(reward_folder)
    module.configure_model()
    module.network.raw = lambda input_ids, attention_mask: attention_mask.sum(1).float()
    metrics = make_trainer().validate(module, DataLoader(BATCHES[ranked], batch_size=None), verbose=False)[0]
    assert metrics["val/length_correlation"] == pytest.approx(1)
    assert metrics["val/agreement"] == metrics["val/agreement_length_baseline"]


# --- by source -------------------------------------------------------------------------------------------------------

TEXT_SOURCES = ["web", "web", "a/b", "web", "a/b", "a/b", "", "web", "a/b"]
LIST_SOURCES = ["web", "a/b", "web"]
PAIR_SOURCES = ["a/b", "web", "a/b", "web"]
NAMES = {"web": "web", "a/b": "a_b"}


def with_sources(kind, sources):
    rows = slice(0, 2), slice(2, None)
    return [kind(which) | {"source": sources[which]} for which in rows]


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize("kind", [rated, ranked, pairs])
def test_agreement_by_source(reward_folder, make_trainer, monkeypatch, kind, stage):
    sources = {rated: TEXT_SOURCES, ranked: LIST_SOURCES, pairs: PAIR_SOURCES}[kind]
    monkeypatch.setitem(BATCHES, kind, with_sources(kind, sources))
    module = RewardModule(reward_folder)
    found, s = evaluated(module, make_trainer, kind, stage)
    means = [average(r) for r in RATINGS]
    all_pairs = {
        rated: [
            (i, j, TEXT_SOURCES[i])
            for i in range(9)
            for j in range(9)
            if means[i] > means[j] and TEXT_SOURCES[i] == TEXT_SOURCES[j]  # over batches, too
        ],
        ranked: [
            (one[a], one[b], source)
            for one, ranks, source in zip(LISTS, RANKS, LIST_SOURCES, strict=True)
            for a in range(len(one))
            for b in range(len(one))
            if ranks[a] < ranks[b]
        ],
        pairs: [
            (*((i, j) if p > 0.5 else (j, i)), source)
            for (i, j, _, p), source in zip(PAIRS, PAIR_SOURCES, strict=True)
            if p != 0.5
        ],
    }[kind]
    for source, name in NAMES.items():
        expected = average(wins(s[i], s[j]) for i, j, of in all_pairs if of == source)
        assert found[f"agreement/{name}"] == pytest.approx(expected), source
    assert sum(name.startswith("agreement/") for name in found) == 2  # the only text without a source has no pair
    again, _ = evaluated(module, make_trainer, kind, stage)  # begins anew
    assert again == pytest.approx(found)


def test_two_sources_of_which_one_is_as_the_scores_are_and_one_the_reverse(reward_folder, make_trainer, monkeypatch):
    """The score is the number of tokens; of `long` the longer text is chosen, of `short` the shorter one."""
    module = RewardModule(reward_folder)
    module.configure_model()
    monkeypatch.setattr(module.network, "raw", lambda input_ids, attention_mask: attention_mask.sum(1).float())
    chosen, rejected = [[1, 1, 1], [1], [2, 2], [3, 3, 3, 3]], [[1], [1, 1], [2, 2, 2, 2], [3]]
    sources = ["long", "short", "short", "long"]
    parts = [slice(0, 3), slice(3, 4)]
    batches = [
        padded(chosen[part] + rejected[part]) | {"margin": torch.zeros(len(chosen[part])), "source": sources[part]}
        for part in parts
    ]
    metrics = make_trainer().validate(module, DataLoader(batches, batch_size=None), verbose=False)[0]
    assert metrics["val/agreement"] == 0.5
    assert (metrics["val/agreement/long"], metrics["val/agreement/short"]) == (1.0, 0.0)
    assert metrics["val/margin"] == pytest.approx((2 - 1 - 2 + 3) / 4)
