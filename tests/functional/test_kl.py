"""KL estimators against the exact KL over an enumerated vocabulary, and the adaptive coefficient."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from lightning_rlhf.functional import adaptive_kl_coef, kl_k1, kl_k2, kl_k3, masked_mean

ESTIMATORS = [kl_k1, kl_k2, kl_k3]


def two_policies():
    """Log-probabilities of every token of a vocabulary of 7 under two policies, in 4 states: (4, 7) each."""
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits.log_softmax(-1)


def test_golden():
    logprobs = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64)
    ref_logprobs = torch.tensor([[-1.0, -3.0, -0.5 + math.log(4)]], dtype=torch.float64)
    # log r = 0, -1, log 4. k1 = -log r; k2 = ½ (log r)²; k3 = r - 1 - log r, with r = 1, 1/e, 4.
    k1 = [[0.0, 1.0, -math.log(4)]]
    k2 = [[0.0, 0.5, math.log(4) ** 2 / 2]]
    k3 = [[0.0, 1 / math.e, 3 - math.log(4)]]
    for estimator, expected in zip(ESTIMATORS, [k1, k2, k3], strict=True):
        assert_close(estimator(logprobs, ref_logprobs), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_expectation_is_the_exact_kl(estimator):
    logprobs, ref_logprobs = two_policies()
    expectation = (logprobs.exp() * estimator(logprobs, ref_logprobs)).sum(-1)
    assert_close(expectation, kl_divergence(Categorical(logits=logprobs), Categorical(logits=ref_logprobs)))


def test_k2_expectation_nears_the_exact_kl_for_near_policies():
    logprobs, other = two_policies()
    ref_logprobs = (logprobs + 1e-3 * (other - logprobs)).log_softmax(-1)
    expectation = (logprobs.exp() * kl_k2(logprobs, ref_logprobs)).sum(-1)
    exact = kl_divergence(Categorical(logits=logprobs), Categorical(logits=ref_logprobs))
    # The two agree in second order only: the relative error is of the order of log r, 1e-3.
    assert_close(expectation, exact, rtol=1e-2, atol=0)


def test_k2_gradient_is_the_log_ratio():
    logprobs, ref_logprobs = two_policies()
    kl_k2(logprobs.requires_grad_(), ref_logprobs).sum().backward()
    assert_close(logprobs.grad, logprobs.detach() - ref_logprobs)


def test_k2_and_k3_are_never_negative_and_all_are_0_at_equality():
    logprobs, ref_logprobs = two_policies()
    assert (kl_k2(logprobs, ref_logprobs) > 0).all()
    assert (kl_k3(logprobs, ref_logprobs) > 0).all()
    for estimator in ESTIMATORS:
        assert not estimator(logprobs, logprobs).any()


def test_k3_keeps_its_digits_for_tiny_log_ratios():
    # In float32 exp(1e-3) - 1 - 1e-3 = 5e-7 keeps one digit if the 1 is subtracted last.
    log_ratio = torch.tensor([1e-3])
    exact = math.expm1(log_ratio.item()) - log_ratio.item()
    # float32 rounds expm1 at 1e-3 · 6e-8 = 6e-11, against a result of 5e-7: one part in 1e4.
    assert_close(kl_k3(-log_ratio, torch.zeros(1)).item(), exact, rtol=3e-4, atol=0)


def test_extreme_log_ratios_stay_finite():
    ref_logprobs = torch.zeros(3)
    logprobs = torch.tensor([-1000.0, -math.inf, 1000.0], requires_grad=True)
    k3 = kl_k3(logprobs, ref_logprobs)
    k3.sum().backward()
    assert k3.isfinite().all()
    assert logprobs.grad.isfinite().all()
    assert k3[2] == 999  # exp(-1000) - 1 + 1000: only the exponential's side is bounded


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e6])
def test_garbage_under_the_mask_changes_neither_value_nor_gradient(estimator, garbage):
    mask = torch.rand(4, 7, generator=torch.Generator().manual_seed(1)) < 0.6

    def value_and_gradient(fill):
        logprobs, ref_logprobs = (
            x.masked_fill(~mask, value) for x, value in zip(two_policies(), (fill, -1.0), strict=True)
        )
        value = masked_mean(estimator(logprobs.requires_grad_(), ref_logprobs), mask)
        value.backward()
        return value.detach(), logprobs.grad

    (value, gradient), (expected_value, expected_gradient) = value_and_gradient(garbage), value_and_gradient(-2.0)
    assert_close(value, expected_value)
    assert_close(gradient[mask], expected_gradient[mask])
    if math.isfinite(garbage) or estimator is not kl_k2:  # a square passes NaN and inf back to where they came from
        assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dtype_and_shape_rules(estimator):
    half = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16)
    assert estimator(half, half).dtype == torch.float32
    with pytest.raises(ValueError, match=r"`ref_logprobs` must have the shape of `logprobs`, \(2,\), but has \(1,\)"):
        estimator(half, half[:1])


def test_adaptive_kl_coef_golden():
    # kl 6.6 is 10% above the target 6; 500 of 10,000 samples: 0.15 · (1 + 0.1 · 0.05) = 0.15075.
    assert_close(adaptive_kl_coef(0.15, kl=6.6, target=6.0, horizon=10_000, num_samples=500), 0.15075)
    # kl 12 is 100% above, clipped to 20%: 0.15 · (1 + 0.2 · 0.05) = 0.1515. kl 0 likewise: 0.15 · 0.99 = 0.1485.
    assert_close(adaptive_kl_coef(0.15, kl=12.0, target=6.0, horizon=10_000, num_samples=500), 0.1515)
    assert_close(adaptive_kl_coef(0.15, kl=0.0, target=6.0, horizon=10_000, num_samples=500), 0.1485)
    # The same with an error clip of 50%: 0.15 · (1 + 0.5 · 0.05) = 0.15375.
    assert_close(adaptive_kl_coef(0.15, kl=12.0, target=6.0, horizon=10_000, num_samples=500, error_clip=0.5), 0.15375)


def test_adaptive_kl_coef_rests_on_the_target():
    assert adaptive_kl_coef(0.15, kl=6.0, target=6.0, horizon=10_000, num_samples=500) == 0.15


def test_adaptive_kl_coef_finds_the_target():
    # A toy policy whose KL falls as the coefficient rises, kl = 1 / kl_coef: the fixed point is kl_coef = 1 / target.
    kl_coef = 1.0
    for _ in range(2000):
        kl_coef = adaptive_kl_coef(kl_coef, kl=1 / kl_coef, target=4.0, horizon=1000, num_samples=100)
    assert_close(kl_coef, 0.25)


@pytest.mark.parametrize("wrong", [{"target": 0.0}, {"horizon": 0.0}])
def test_adaptive_kl_coef_refuses_an_impossible_target_or_horizon(wrong):
    with pytest.raises(ValueError, match="`target` and `horizon` must be positive"):
        adaptive_kl_coef(**{"kl_coef": 0.1, "kl": 1.0, "target": 6.0, "horizon": 100.0, "num_samples": 1} | wrong)
