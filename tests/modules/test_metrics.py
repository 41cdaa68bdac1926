"""Metrics against brute force, over one update and over several."""

import math

import pytest
import torch

from lightning_rlhf.modules import metrics
from lightning_rlhf.modules.metrics import (
    CalibrationError,
    MeanDifference,
    Moments,
    PairAgreement,
    PairCalibrationError,
    PairMargin,
    Perplexity,
    SourceAgreement,
    label,
    over_pairs,
)


def fed(metric, *columns, parts=3):
    for part in zip(*(column.chunk(parts) for column in columns), strict=True):
        metric.update(*part)
    return metric.compute()


def test_perplexity_is_exp_of_the_mean_over_tokens():
    metric = Perplexity()
    metric.update(torch.tensor([1.0, 3.0, 5.0]))
    metric.update(torch.tensor([0.0]))
    assert metric.compute().item() == pytest.approx(math.exp(9 / 4))


@pytest.mark.parametrize("parts", [1, 3])
def test_moments_are_mean_and_biased_deviation(parts):
    x = torch.randn(10, generator=torch.Generator().manual_seed(0)) * 2 + 1000
    mean, std = fed(Moments(), x, parts=parts)
    torch.testing.assert_close(mean, x.double().mean())
    torch.testing.assert_close(std, x.double().std(correction=0), rtol=1e-6, atol=1e-6)


def test_moments_of_equal_values_have_no_deviation():
    mean, std = fed(Moments(), torch.full((7,), 0.1))
    assert (mean.item(), std.item()) == (pytest.approx(0.1), pytest.approx(0, abs=1e-7))


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("gap", [0.0, 1.0, 2.0])
def test_agreement_counts_pairs(gap, parts):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(6, (20,), generator=generator).float()  # with ties
    ratings = torch.randint(5, (20,), generator=generator).float()
    right, total = 0.0, 0
    for i in range(20):
        for j in range(20):
            if ratings[i] - ratings[j] > gap:
                total += 1
                right += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    assert fed(PairAgreement(gap), scores, ratings, parts=parts).item() == pytest.approx(right / total)


def test_agreement_is_1_in_order_0_in_reverse_and_nan_without_pairs():
    x = torch.arange(4.0)
    assert fed(PairAgreement(), x.exp(), x) == 1
    assert fed(PairAgreement(), -x, x) == 0
    assert fed(PairAgreement(5.0), x, x).isnan()


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("bins", [10, 4])
def test_calibration_error_is_the_sum_over_bins(bins, parts):
    generator = torch.Generator().manual_seed(2)
    p, y = torch.rand(50, generator=generator), torch.rand(50, generator=generator).round(decimals=1)
    p[0] = 1.0  # belongs to the last bin
    pairs = [(a, b) for a, b in zip(p.double().tolist(), y.double().tolist(), strict=True)]
    pairs += [(1 - a, 1 - b) for a, b in zip(p.tolist(), y.tolist(), strict=True)]
    error = 0.0
    for k in range(bins):
        inside = [(a, b) for a, b in pairs if k / bins <= a < (k + 1) / bins or (a == 1.0 and k == bins - 1)]
        if inside:
            distance = abs(sum(a for a, _ in inside) - sum(b for _, b in inside)) / len(inside)
            error += len(inside) / len(pairs) * distance
    assert fed(PairCalibrationError(bins), p, y, parts=parts).item() == pytest.approx(error, rel=1e-5)


def test_calibration_error_by_hand():
    # (0.85, 1) and (0.15, 0) twice: off by 0.15 everywhere
    metric = PairCalibrationError()
    metric.update(torch.tensor([0.85, 0.15]), torch.tensor([1.0, 0.0]))
    assert metric.compute().item() == pytest.approx(0.15)
    metric.reset()
    metric.update(torch.tensor([0.7, 0.7]), torch.tensor([0.9, 0.5]))  # shares that average to the probability
    assert metric.compute().item() == pytest.approx(0, abs=1e-6)


def test_calibration_of_levels_counts_each_prediction_once():
    # Bins [0.2, 0.3): (0.2, 0) and (0.25, 1); [0.8, 0.9): (0.85, 1)
    p, y = torch.tensor([0.2, 0.85, 0.25]), torch.tensor([0.0, 1.0, 1.0])
    metric = CalibrationError()
    assert fed(metric, p, y).item() == pytest.approx((abs(0.45 - 1) + abs(0.85 - 1)) / 3)
    assert fed(PairCalibrationError(), p, y).item() != pytest.approx(metric.compute().item())


@pytest.mark.parametrize("kind", [CalibrationError, PairCalibrationError])
def test_reliability_outlives_a_reset(kind):
    metric = kind(4)
    assert metric.reliability is None
    metric.update(torch.tensor([0.1, 0.9, 1.0]), torch.tensor([0.0, 1.0, 0.0]))
    error = metric.compute()
    metric.reset()
    count, predicted, observed = metric.reliability.T
    twice = kind is PairCalibrationError
    assert count.tolist() == ([3, 0, 0, 3] if twice else [1, 0, 0, 2])
    assert predicted[[0, 3]].tolist() == pytest.approx([0.2 / 3, 2.8 / 3] if twice else [0.1, 0.95])
    assert observed[[0, 3]].tolist() == pytest.approx([1 / 3, 2 / 3] if twice else [0, 0.5])
    assert predicted[1:3].isnan().all()
    gap = (count * (predicted - observed).abs()).nansum() / count.sum()
    assert gap.item() == pytest.approx(error.item())


def test_metrics_do_not_follow_gradients():
    x = torch.ones(3, requires_grad=True)
    moments, agreement, calibration = Moments(), PairAgreement(), PairCalibrationError()
    moments.update(x)
    agreement.update(x, torch.arange(3.0))
    calibration.update(x / 2, torch.ones(3))
    assert not any(m.requires_grad for m in (moments.sums, agreement.scores[0], calibration.sums))


# --- pairs of texts ------------------------------------------------------------------------------------------------


def test_sums_over_pairs_by_hand(monkeypatch):
    scores, ratings = torch.tensor([1.0, 3.0, 0.5, 3.0]), torch.tensor([2.0, 2.0, 1.0, 5.0])
    # Rated higher: 3 above 0, 1, 2 (by 2, 0, 2.5) and 0 and 1 above 2 (by 0.5, 2.5).
    assert over_pairs(scores, ratings).tolist() == [4.5, 7.5, 5.0]
    assert over_pairs(scores, ratings, min_gap=1.0).tolist() == [2.5, 4.5, 3.0]
    assert over_pairs(scores, torch.zeros(4)).tolist() == [0.0, 0.0, 0.0]
    monkeypatch.setattr(metrics, "ROWS", 3)  # two parts of unequal size
    assert over_pairs(scores, ratings).tolist() == [4.5, 7.5, 5.0]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("gap", [0.0, 2.0])
def test_the_margin_of_pairs_is_a_mean_difference(gap, parts):
    generator = torch.Generator().manual_seed(3)
    scores, ratings = (torch.randn(20, generator=generator), torch.randint(5, (20,), generator=generator).float())
    differences = [
        (scores[i] - scores[j]).item() for i in range(20) for j in range(20) if ratings[i] - ratings[j] > gap
    ]
    found = fed(PairMargin(gap), scores, ratings, parts=parts).item()
    assert found == pytest.approx(sum(differences) / len(differences), rel=1e-5)


# --- sources --------------------------------------------------------------------------------------------------------


def fed_pairs(pairs, most=20, parts=1):
    """Of (source, agreement, counts)."""
    metric = SourceAgreement(most)
    for part in range(parts):
        sources, agreement, counts = zip(*pairs[part::parts], strict=True)
        metric.update_pairs(list(sources), torch.tensor(agreement), torch.tensor(counts))
    return metric


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_agreement_is_reported_by_source(parts):
    pairs = [("hh", 1.0, True), ("hh", 0.5, True), ("web", 0.0, True), ("hh", 0.0, True), ("web", 1.0, False)]
    pairs += [("undecided", 1.0, False)]
    assert fed_pairs(pairs, parts=parts).compute() == {"hh": 0.5, "web": 0.0}


def test_texts_are_compared_within_their_source():
    metric = SourceAgreement()
    metric.update_texts(["a", "b", "a"], torch.tensor([1.0, 9.0, 2.0]), torch.tensor([1.0, 0.0, 2.0]))
    metric.update_texts(["b", "a"], torch.tensor([5.0, 3.0]), torch.tensor([1.0, 0.0]))
    # a: (1, 1), (2, 2), (3, 0): one of three pairs is right, over two batches. b: (9, 0), (5, 1): none.
    assert metric.compute() == {"a": pytest.approx(1 / 3), "b": 0.0}
    metric.reset()
    metric.update_texts(["a", "b"], torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    assert metric.compute() == {}  # no two of one source


def test_small_sources_and_rows_without_one_are_others_together():
    pairs = [("big", 1.0, True)] * 3 + [("b", 1.0, True)] * 2 + [("a", 0.0, True)] * 2
    pairs += [("tiny", 1.0, True), ("", 0.0, True), ("other", 0.0, True)]
    assert fed_pairs(pairs).compute() == {"a": 0.0, "b": 1.0, "big": 1.0, "other": 0.0, "tiny": 1.0}
    # Of a and b, as large, the first by name stays; the rest: b twice right, tiny right, two wrong.
    assert fed_pairs(pairs, most=2).compute() == {"a": 0.0, "big": 1.0, "other": pytest.approx(3 / 5)}
    texts = SourceAgreement(most=1)
    columns = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 5.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 9.0, 7.0, 1.0, 2.0])
    texts.update_texts(["x", "x", "x", "y", "y", "z", "z"], *columns)
    assert texts.compute() == {"x": 1.0, "other": 0.0}  # never y against z, which would be right


def test_sources_become_parts_of_names():
    assert label("Anthropic/hh-rlhf") == "Anthropic_hh-rlhf"
    assert label(" a  b\n") == "a_b"
    assert label("zürich v1.2") == "zürich_v1.2"
    assert label("x" * 100) == "x" * 60
    assert label("") == label(" / ") == "other"
    pairs = [("a/b", 1.0, True), ("a b", 0.0, True)]
    assert fed_pairs(pairs).compute() == {"a_b": 0.5}


def test_sources_of_all_ranks_are_counted_together(monkeypatch):
    mine = fed_pairs([("a", 1.0, True)] * 2 + [("b", 1.0, True)])
    other = fed_pairs([("a", 0.0, True), ("c", 0.5, True)])
    other.update_texts(["t", "d"], torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    mine.update_texts(["d"], torch.tensor([3.0]), torch.tensor([1.0]))
    monkeypatch.setattr(metrics, "of_all_ranks", lambda state: [state, (other._pairs, other._texts)])
    assert mine.compute() == {"a": pytest.approx(2 / 3), "b": 1.0, "c": 0.5, "d": 0.0}


@pytest.mark.parametrize("parts", [1, 2])
def test_mean_difference_is_of_two_means(parts):
    values, first = torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([True, False, True, True])
    assert fed(MeanDifference(), values, first, parts=parts).item() == 2.0  # 12 / 3 − 2
    assert fed(MeanDifference(), values, torch.ones(4, dtype=torch.bool)).isnan()
