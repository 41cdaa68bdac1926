"""PPO finds the optimum that theory names, where all responses can be listed."""

import pytest
import torch
from enumerable_toy import Toy, responses, train

from lightning_rlhf.modules.rollout import Sampling, sample


def test_the_listed_responses_are_all_there_are():
    toy = Toy(seed=0)
    assert len(responses()) == 1 + 3 + 9 + 27
    torch.testing.assert_close(toy.reference.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_samples_follow_the_listed_distribution():
    toy = Toy(seed=0)
    n = 20_000
    prompts = torch.tensor([Toy.prompt]).expand(n, 1)
    rollout = sample(toy.model, prompts, torch.ones_like(prompts), Sampling(3, (0,), 0))
    drawn = [tuple(ids[mask].tolist()) for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    expected = toy.reference.exp()
    share = torch.tensor([drawn.count(response) / n for response in responses()], dtype=torch.float64)
    deviation = (share - expected) / (expected * (1 - expected) / n).sqrt()
    assert deviation.abs().max() < 4.5  # 40 standard normal values: above 4.5 once in 3,700 runs
    assert set(drawn) <= set(responses())


def test_the_optimum_beats_its_neighbours():
    toy = Toy(seed=1)
    best = toy.locate(toy.optimum())
    for _ in range(20):
        other = toy.locate((toy.optimum() + 0.1 * torch.randn(len(responses()))).log_softmax(0))
        assert other.reward - toy.beta * other.kl < best.reward - toy.beta * best.kl


@pytest.mark.slow
@pytest.mark.parametrize("whiten_advantages", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_ends_at_the_optimum(seed: int, whiten_advantages: bool):
    toy = Toy(seed)
    start = toy.locate(toy.reference)
    assert start.distance > 0.4
    end = train(toy, seed, whiten_advantages=whiten_advantages)
    best = toy.locate(toy.optimum())
    assert end.distance < 0.01
    assert abs(end.reward - best.reward) < 0.05
    assert abs(end.kl - best.kl) < 0.05
