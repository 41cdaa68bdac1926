"""Metrics against brute force, over one update and over several."""

import math

import pytest
import torch

from lightning_rlhf.modules.metrics import (
    CalibrationError,
    Mean,
    Moments,
    PairAgreement,
    PairCalibrationError,
    Perplexity,
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


def test_mean_is_over_items_not_over_batches():
    metric = Mean()
    metric.update(torch.tensor(1.0), torch.tensor(1))
    metric.update(torch.tensor(11.0), torch.tensor(3))
    metric.update(torch.tensor(0.0), torch.tensor(0))
    assert metric.compute() == 3.0
    metric.update(torch.tensor(torch.nan), torch.tensor(1))
    assert metric.compute().isnan()


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
