"""Losses of offline preference optimisation: worked numbers, printed formulas, derivatives, limits."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.functional import (
    alpha_link,
    bradley_terry_loss,
    exact_kl,
    forward_kl_link,
    hinge_preference_loss,
    ipo_loss,
    jensen_shannon_link,
    log_odds,
    masked_mean,
    odds_ratio_loss,
    reverse_kl_link,
    smoothed_preference,
    soft_bradley_terry_loss,
    soft_preference_loss,
    unbiased_preference,
)

MASK = torch.tensor([True, False, True])


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_tensors(number, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(number, 12, generator=generator, dtype=torch.float64)


# f of each divergence, as in table 1 of Wang et al. 2023, and its link.
DIVERGENCES = {
    "reverse KL": (lambda x: x * x.log(), reverse_kl_link),
    "forward KL": (lambda x: -x.log(), forward_kl_link),
    "Jensen-Shannon": (lambda x: x * x.log() - (x + 1) * ((x + 1) / 2).log(), jensen_shannon_link),
    "alpha": (lambda x: (x**0.7 - 0.7 * x - 0.3) / (0.3 * (0.3 - 1)), lambda u: alpha_link(u, 0.3)),
}


class TestLinks:
    def test_golden(self):
        u = double(0, math.log(3), -math.log(3))
        assert_close(reverse_kl_link(u), u)
        assert_close(forward_kl_link(u), double(-1, -1 / 3, -3))
        assert_close(jensen_shannon_link(u), double(0, math.log(3 / 2), math.log(1 / 2)))  # log 2x / (1 + x)
        assert_close(alpha_link(u, 0.5), double(0, 2 * (1 - 3**-0.5), 2 * (1 - 3**0.5)))

    @pytest.mark.parametrize("name", DIVERGENCES)
    def test_is_the_derivative_of_f_up_to_a_constant(self, name):
        f, link = DIVERGENCES[name]
        u = random_tensors(1)[0]
        x = u.exp().requires_grad_()
        f(x).sum().backward()
        gap = link(u) - x.grad
        assert_close(gap, gap[0].expand_as(gap))

    def test_alpha_lies_between_the_two_kls(self):
        u = random_tensors(1)[0]
        assert_close(alpha_link(u, 1e-7), reverse_kl_link(u), rtol=1e-5, atol=1e-5)
        assert_close(alpha_link(u, 1.0), 1 + forward_kl_link(u))

    @pytest.mark.parametrize("link", [link for _, link in DIVERGENCES.values()], ids=list(DIVERGENCES))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_finite_for_any_log_ratio(self, link, dtype):
        u = torch.tensor([-1e4, -50.0, 50.0, 1e4], dtype=dtype, requires_grad=True)
        loss = bradley_terry_loss(link(u), link(-u))
        loss.sum().backward()
        assert loss.dtype == torch.float32
        assert loss.isfinite().all()
        assert u.grad.isfinite().all()
        assert loss[0] > loss[3]

    def test_links_grow_up_to_their_bound(self):
        u = torch.linspace(-19, 5, 50, dtype=torch.float64)
        for _, link in DIVERGENCES.values():
            assert (link(u).diff() > 0).all()
        assert forward_kl_link(double(-30)) == forward_kl_link(double(-20))  # no further than MAX_LOG_RATIO

    def test_alpha_must_be_positive(self):
        with pytest.raises(ValueError, match=r"`alpha` must be positive, but is -0.5"):
            alpha_link(torch.zeros(1), -0.5)


class TestLosses:
    def test_ipo_golden(self):
        # β = 0.25 aims at 1 / 0.5 = 2.
        assert ipo_loss(double(0, 2, 5), 0.25).tolist() == [4, 0, 9]

    def test_ipo_is_least_at_its_aim_and_dpo_nowhere(self):
        aim = double(5).requires_grad_()
        ipo_loss(aim, 0.1).sum().backward()
        assert aim.grad.item() == 0
        further = ipo_loss(double(5.5, 4.5), 0.1)
        assert_close(further, double(0.25, 0.25))
        assert (soft_bradley_terry_loss(double(1, 5, 50), torch.ones(3).double()).diff() < 0).all()

    def test_hinge_golden(self):
        difference = double(-2, 0, 2, 4, 9).requires_grad_()
        loss = hinge_preference_loss(difference, 0.25)
        loss.sum().backward()
        assert loss.tolist() == [1.5, 1, 0.5, 0, 0]
        assert difference.grad.tolist() == [-0.25, -0.25, -0.25, 0, 0]

    def test_log_odds_golden(self):
        assert_close(log_odds(double(0.5, 0.75, 0.2).log()), double(0, math.log(3), math.log(1 / 4)))

    def test_log_odds_is_the_inverse_of_log_sigmoid(self):
        x = random_tensors(1, scale=8)[0]
        assert_close(log_odds(torch.nn.functional.logsigmoid(x)), x)

    def test_log_odds_keeps_its_digits_at_both_ends(self):
        # float32, in which 1 − e^p is 0 for p = −1e-9 and e^p is 0 for p = −200
        p = torch.tensor([-1e-4, -2.0, -200.0])
        exact = torch.tensor([float(v - math.log(-math.expm1(v))) for v in p.tolist()])
        assert_close(log_odds(p), exact)
        assert log_odds(p)[2] == -200

    def test_log_odds_and_its_gradient_are_finite_for_certain_tokens(self):
        p = torch.tensor([0.0, -1e-9, -1e-7, -1e4], requires_grad=True)
        loss = odds_ratio_loss(p, p.flip(0))
        loss.sum().backward()
        assert loss.isfinite().all()
        assert p.grad.isfinite().all()

    def test_odds_ratio_golden(self):
        # odds 3 and 1/3: −log σ(log 9) = log(10/9); reversed: log 10
        high, low = double(0.75).log(), double(0.25).log()
        assert_close(odds_ratio_loss(high, low), double(math.log(10 / 9)))
        assert_close(odds_ratio_loss(low, high), double(math.log(10)))

    def test_odds_ratio_as_printed(self):
        chosen, rejected = -random_tensors(2).abs() - 0.01
        odds = [p.exp() / (1 - p.exp()) for p in (chosen, rejected)]
        assert_close(odds_ratio_loss(chosen, rejected), -(odds[0] / odds[1]).log().sigmoid().log())


class TestLabels:
    def test_soft_label_golden(self):
        found = soft_preference_loss(double(1, 1, 1), double(3, 3, 3), double(1, 0, 0.75))
        assert found.tolist() == [1, 3, 1.5]

    def test_of_dpo_it_is_the_soft_bradley_terry_loss(self):
        a, b, p = random_tensors(3)
        p = p.sigmoid()
        found = soft_preference_loss(bradley_terry_loss(a, b), bradley_terry_loss(b, a), p)
        assert_close(found, soft_bradley_terry_loss(a - b, p))

    def test_smoothing_golden(self):
        assert_close(smoothed_preference(double(1, 0, 0.5, 0.8), 0.1), double(0.9, 0.1, 0.5, 0.74))
        assert smoothed_preference(double(1, 0.3), 0.0).tolist() == [1, 0.3]

    def test_unbiased_golden(self):
        assert_close(unbiased_preference(double(1, 0, 0.5, 0.9), 0.1), double(1.125, -0.125, 0.5, 1))
        assert unbiased_preference(double(1, 0.3), 0.0).tolist() == [1, 0.3]

    def test_cdpo_as_printed(self):
        """(1 − ε) L(w, l) + ε L(l, w), equation 3 of the note."""
        d, epsilon = random_tensors(1)[0], 0.2
        label = smoothed_preference(torch.ones_like(d), epsilon)
        printed = -(1 - epsilon) * d.sigmoid().log() - epsilon * (-d).sigmoid().log()
        assert_close(soft_bradley_terry_loss(d, label), printed)

    def test_robust_dpo_as_printed(self):
        """((1 − ε) L(w, l) − ε L(l, w)) / (1 − 2ε)."""
        a, b = random_tensors(2)
        epsilon = 0.2
        label = unbiased_preference(torch.ones_like(a), epsilon)
        forward, backward = -(a - b).sigmoid().log(), -(b - a).sigmoid().log()
        printed = ((1 - epsilon) * forward - epsilon * backward) / (1 - 2 * epsilon)
        assert_close(soft_preference_loss(bradley_terry_loss(a, b), bradley_terry_loss(b, a), label), printed)
        assert_close(soft_bradley_terry_loss(a - b, label), printed)

    @pytest.mark.parametrize("loss", [lambda d: ipo_loss(d, 0.1), lambda d: hinge_preference_loss(d, 0.5)])
    def test_robust_losses_of_flipped_labels_are_in_expectation_those_of_clean_ones(self, loss):
        """Of a clean pair a share ε is seen swapped."""
        d, epsilon = random_tensors(1)[0], 0.3
        one, zero = (unbiased_preference(torch.full_like(d, seen), epsilon) for seen in (1.0, 0.0))
        clean, swapped = loss(d), loss(-d)
        seen = [soft_preference_loss(clean, swapped, label) for label in (one, zero)]
        assert_close((1 - epsilon) * seen[0] + epsilon * seen[1], clean)

    def test_unbiased_undoes_smoothing(self):
        p = random_tensors(1)[0].sigmoid()
        assert_close(unbiased_preference(smoothed_preference(p, 0.3), 0.3), p)

    def test_a_coin_teaches_nothing(self):
        with pytest.raises(ValueError, match=r"`flip_rate` must be below 0.5, but is 0.5"):
            unbiased_preference(torch.ones(1), 0.5)


class TestExactKL:
    def test_golden(self):
        # ½ log(½ / ¼) + ½ log(½ / ¾) = ½ log(4 / 3)
        logits, ref_logits = double(0.5, 0.5).log()[None] + 3, double(0.25, 0.75).log()[None] - 1
        assert_close(exact_kl(logits, ref_logits), double(0.5 * math.log(4 / 3)))
        assert_close(exact_kl(ref_logits, logits), double(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)))

    def test_is_the_mean_of_k1_over_all_tokens(self):
        logits, ref_logits = random_tensors(2).view(2, 3, 4)
        p, q = logits.softmax(-1), ref_logits.softmax(-1)
        expected = [sum(a * math.log(a / b) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
        assert_close(exact_kl(logits, ref_logits), double(*map(float, expected)))

    def test_chunks_change_nothing(self, monkeypatch):
        logits, ref_logits = random_tensors(2).view(2, 6, 2)
        expected = exact_kl(logits, ref_logits)
        monkeypatch.setattr("lightning_rlhf.functional.kl.CHUNK", 4)
        assert torch.equal(exact_kl(logits, ref_logits), expected)

    def test_tokens_that_cannot_come(self):
        logits = torch.tensor([[0.0, -torch.inf]])
        assert_close(exact_kl(logits, torch.zeros(1, 2)), torch.tensor([math.log(2)]))
        assert exact_kl(logits, logits).item() == 0
        assert exact_kl(torch.zeros(1, 2), logits).item() == math.inf

    def test_of_nothing_and_of_half_precision(self):
        assert exact_kl(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
        assert exact_kl(torch.zeros(2, 4).bfloat16(), torch.zeros(2, 4).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e6])
def test_garbage_in_pairs_that_do_not_count_changes_neither_value_nor_gradient(garbage):
    def value_and_gradient(fill):
        u = double(-0.3, fill, -2).requires_grad_()
        losses = [ipo_loss(u, 0.3), hinge_preference_loss(u, 0.3), odds_ratio_loss(u, double(-1, -1, -1))]
        losses += [link(u) for _, link in DIVERGENCES.values()]
        sum(masked_mean(loss, MASK) for loss in losses).backward()
        return u.grad[MASK]

    assert_close(value_and_gradient(garbage), value_and_gradient(-1.0))


def test_wrong_shapes_are_refused():
    x, short = torch.zeros(3), torch.zeros(2)
    with pytest.raises(ValueError, match=r"`rejected` must have the shape of `chosen`, \(3,\), but has \(2,\)"):
        odds_ratio_loss(x, short)
    with pytest.raises(ValueError, match="`swapped_loss`"):
        soft_preference_loss(x, short, x)
    with pytest.raises(ValueError, match="`preference`"):
        soft_preference_loss(x, x, short)
    with pytest.raises(ValueError, match="`ref_logits`"):
        exact_kl(torch.zeros(2, 3), torch.zeros(2, 4))
