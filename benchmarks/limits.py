"""Where methods must end when all responses can be listed: distributions over responses, in float64.

Nothing here uses the package: these are the equations, or the slowest way to solve them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Responses = Sequence[tuple[int, ...]]


def kl_regularised(log_reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log π* of max E[R] − β KL(π ‖ π_ref):  π* ∝ π_ref · exp(R / β).

    The end of PPO, RLOO, REINFORCE++, any group method with the KL in the reward, DPO with exact preferences, online
    DPO with Bradley-Terry labels. Korbak et al. 2022, https://arxiv.org/abs/2205.11275.
    """
    return (log_reference + rewards / beta).log_softmax(0)


def ipo(log_reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log π* of IPO over all pairs:  π* ∝ π_ref · exp(mean_j p(i beats j) / β),  p = σ(R_i − R_j).

    Azar et al. 2023, equation 7 with Ψ the identity, https://arxiv.org/abs/2310.12036.
    """
    wins = (rewards[:, None] - rewards[None, :]).sigmoid().mean(dim=1)
    return (log_reference + wins / beta).log_softmax(0)


def best_of_n(log_reference: Tensor, rewards: Tensor, n: int) -> Tensor:
    """log of the distribution of the best of n responses:  F(R)^n − (F(R) − π_ref)^n,  for rewards that all differ."""
    order = rewards.argsort()
    reference = log_reference.exp()[order]
    share = reference.cumsum(0)  # F: of responses whose reward is at most this
    log = log_reference.clone()
    log[order] = (share**n - (share - reference).clamp(min=0) ** n).log()
    return log


def stationary(
    responses: Responses,
    log_reference: Tensor,
    rewards: Tensor,
    beta: float,
    *,
    normalized: bool,
    per_response: bool,
    steps: int = 6000,
) -> Tensor:
    """log π where the expected update of a group method with k3 in the loss is 0, for groups without end.

    Σ_y π(y) w(y) Σ_t [ A(y) ∇ log π(y_t|s_t) − β ∇ k3_t ] = 0,
    A = R − E[R], divided by the standard deviation of R if `normalized`; w = 1 / |y| if `per_response`, else 1;
    ∇ acts on π(y_t|s_t) alone. Each state has its own logits, and Adam runs with the exact expectation.
    """
    states = sorted({response[:t] for response in responses for t in range(len(response))})
    tokens = 1 + max(token for response in responses for token in response)
    length = max(map(len, responses))
    state = torch.tensor([[states.index(r[:t]) if t < len(r) else 0 for t in range(length)] for r in responses])
    token = torch.tensor([[r[t] if t < len(r) else 0 for t in range(length)] for r in responses])
    mask = torch.tensor([[t < len(r) for t in range(length)] for r in responses])

    def per_token(tables: Tensor) -> Tensor:
        return torch.where(mask, tables[state, token], 0.0)  # (responses, length)

    reference = conditionals(responses, log_reference, states, tokens)
    theta = reference.clamp(min=-30).clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weight = 1 / mask.sum(1) if per_response else torch.ones(len(responses), dtype=torch.float64)
    for _ in range(steps):
        logs = per_token(theta.log_softmax(1))
        p = logs.sum(1).detach().exp()
        mean = p @ rewards
        advantage = rewards - mean
        if normalized:
            advantage = advantage / (p @ (rewards - mean) ** 2).sqrt()
        ratio = per_token(reference) - logs
        k3 = torch.where(mask, ratio.exp() - 1 - ratio, 0.0)
        loss = (p * weight * (beta * k3 - advantage[:, None] * logs).sum(1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return per_token(theta.detach().log_softmax(1)).sum(1)


def conditionals(responses: Responses, log_probabilities: Tensor, states: list, tokens: int) -> Tensor:
    """log π(token | state), (states, tokens), of a distribution over responses."""
    p = log_probabilities.exp()
    table = torch.zeros(len(states), tokens, dtype=torch.float64)
    for response, probability in zip(responses, p, strict=True):
        for t, token in enumerate(response):
            table[states.index(response[:t]), token] += probability
    return (table / table.sum(1, keepdim=True)).log()
