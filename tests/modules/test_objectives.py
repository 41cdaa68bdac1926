"""Objectives of pairs: worked numbers, sums against means, references, arguments."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.modules.objectives import (
    CPO,
    DPO,
    IPO,
    ORPO,
    Alpha,
    Divergence,
    ForwardKL,
    Hinge,
    JensenShannon,
    Likelihoods,
    PairObjective,
    ReverseKL,
    SimPO,
)

EVERY = [DPO(), DPO(divergence=ForwardKL()), IPO(), Hinge(), SimPO(), CPO(), ORPO()]
NAMES = ["DPO", "DPO forward KL", "IPO", "Hinge", "SimPO", "CPO", "ORPO"]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def completions(logprobs, ref_logprobs, lengths):
    return Likelihoods(double(*logprobs), double(*ref_logprobs), torch.tensor(lengths))


def sigmoid_loss(x):
    return math.log1p(math.exp(-x))


# log π −4 and −6 against −5 and −3: log-ratios 1 and −3, a difference of 4; 2 and 4 tokens: means −2 and −1.5.
CHOSEN, REJECTED = completions([-4], [-5], [2]), completions([-6], [-3], [4])


def loss(objective):
    return objective.loss(CHOSEN, REJECTED).item()


def scores(objective):
    return objective.score(CHOSEN).item(), objective.score(REJECTED).item()


def test_dpo():
    assert loss(DPO(beta=0.5)) == pytest.approx(sigmoid_loss(2))
    assert scores(DPO(beta=0.5)) == (0.5, -1.5)
    assert loss(DPO()) == pytest.approx(sigmoid_loss(0.4))
    assert isinstance(DPO().divergence, ReverseKL)


@pytest.mark.parametrize(
    ("divergence", "links"),
    [
        (ReverseKL(), (1, -3)),
        (ForwardKL(), (-math.exp(-1), -math.exp(3))),
        (JensenShannon(), (math.log(2 / (1 + math.exp(-1))), math.log(2 / (1 + math.exp(3))))),
        (Alpha(0.5), (2 * (1 - math.exp(-0.5)), 2 * (1 - math.exp(1.5)))),
        (Alpha(0.25), (4 * (1 - math.exp(-0.25)), 4 * (1 - math.exp(0.75)))),
    ],
    ids=["ReverseKL", "ForwardKL", "JensenShannon", "Alpha(0.5)", "Alpha(0.25)"],
)
def test_dpo_of_other_divergences(divergence, links):
    objective = DPO(beta=0.2, divergence=divergence)
    assert scores(objective) == pytest.approx((0.2 * links[0], 0.2 * links[1]))
    assert loss(objective) == pytest.approx(sigmoid_loss(0.2 * (links[0] - links[1])))


def test_ipo_takes_sums():
    assert loss(IPO(beta=0.1)) == pytest.approx((4 - 5) ** 2)
    assert loss(IPO(beta=0.5)) == pytest.approx((4 - 1) ** 2)
    assert scores(IPO(beta=0.5)) == (0.5, -1.5)


def test_hinge():
    assert loss(Hinge(beta=0.1)) == pytest.approx(1 - 0.4)
    assert loss(Hinge(beta=0.5)) == 0
    assert scores(Hinge(beta=0.5)) == (0.5, -1.5)


def test_simpo_takes_means_and_its_margin_stands_outside_beta():
    # r = 2 · −2 and 2 · −1.5: the rejected is ahead by 1; with γ = 1 it is 2 behind what is wanted.
    assert scores(SimPO(beta=2.0)) == (-4, -3)
    assert loss(SimPO(beta=2.0, gamma=0.0)) == pytest.approx(sigmoid_loss(-1))
    assert loss(SimPO(beta=2.0, gamma=1.0)) == pytest.approx(sigmoid_loss(-2))
    assert loss(SimPO(beta=4.0, gamma=1.0)) == pytest.approx(sigmoid_loss(-3))


def test_cpo_takes_sums_and_adds_the_likelihood_per_token():
    assert scores(CPO(beta=0.5)) == (-2, -3)
    assert loss(CPO(beta=0.5, nll_coef=0.0)) == pytest.approx(sigmoid_loss(1))
    assert loss(CPO(beta=0.5)) == pytest.approx(sigmoid_loss(1) + 2)
    assert loss(CPO(beta=0.5, nll_coef=0.25)) == pytest.approx(sigmoid_loss(1) + 0.5)


def test_orpo_takes_means():
    odds = [math.exp(p) / (1 - math.exp(p)) for p in (-2, -1.5)]
    term = -math.log(1 / (1 + odds[1] / odds[0]))
    assert scores(ORPO()) == pytest.approx(tuple(map(math.log, odds)))
    assert loss(ORPO(odds_coef=0.1)) == pytest.approx(2 + 0.1 * term)
    assert loss(ORPO(odds_coef=1.0)) == pytest.approx(2 + term)


@pytest.mark.parametrize("objective", EVERY, ids=NAMES)
def test_each_pair_stands_for_itself(objective):
    chosen = completions([-4, -7, -1], [-5, -6, -2], [2, 3, 1])
    rejected = completions([-6, -2, -9], [-3, -2, -8], [4, 1, 5])
    together = objective.loss(chosen, rejected)
    for i in range(3):
        one = [Likelihoods(*(field[i : i + 1] for field in side)) for side in (chosen, rejected)]
        assert_close(objective.loss(*one), together[i : i + 1])


@pytest.mark.parametrize("objective", EVERY, ids=NAMES)
def test_the_reference_matters_where_it_is_said_to(objective):
    moved = objective.loss(CHOSEN, REJECTED._replace(ref_logprobs=double(-3.5))).item()
    assert (moved != loss(objective)) == objective.uses_reference


@pytest.mark.parametrize("objective", EVERY, ids=NAMES)
def test_a_more_likely_chosen_completion_is_better(objective):
    better = CHOSEN._replace(logprobs=double(-3.5))
    assert objective.loss(better, REJECTED).item() < loss(objective)
    assert objective.score(better).item() > objective.score(CHOSEN).item()


@pytest.mark.parametrize("objective", EVERY, ids=NAMES)
def test_gradients_are_those_of_a_small_step(objective):
    logprobs = double(-4, -6).requires_grad_()

    def of(values):
        return objective.loss(CHOSEN._replace(logprobs=values[:1]), REJECTED._replace(logprobs=values[1:])).sum()

    assert torch.autograd.gradcheck(of, logprobs)


def test_at_the_reference_dpo_is_log_2_and_ipo_the_square_of_its_aim():
    same = completions([-4, -9], [-4, -9], [2, 3]), completions([-1, -2], [-1, -2], [3, 1])
    for divergence in (ReverseKL(), ForwardKL(), JensenShannon(), Alpha(0.3)):
        assert_close(DPO(0.7, divergence).loss(*same), double(math.log(2), math.log(2)))
    assert IPO(0.25).loss(*same).tolist() == [4, 4]
    assert Hinge(0.25).loss(*same).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(beta=0), "`beta` must be above 0, but got 0"),
        (lambda: IPO(beta=-1.0), "`beta` must be above 0, but got -1.0"),
        (lambda: Hinge(beta=0), "`beta` must be above 0"),
        (lambda: SimPO(beta=0), "`beta` must be above 0"),
        (lambda: SimPO(gamma=-0.5), "`gamma` must be at least 0, but got -0.5"),
        (lambda: CPO(beta=0), "`beta` must be above 0"),
        (lambda: CPO(nll_coef=-1), "`nll_coef` must be at least 0"),
        (lambda: ORPO(odds_coef=0), "`odds_coef` must be above 0"),
        (lambda: Alpha(0), "`alpha` must be above 0 and at most 1, but got 0"),
        (lambda: Alpha(1.5), "`alpha` must be above 0 and at most 1, but got 1.5"),
    ],
)
def test_arguments_that_cannot_work(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_bases_are_no_choice():
    for base in (PairObjective, Divergence):
        with pytest.raises(TypeError, match="abstract"):
            base()
