"""What is seen of sampled responses: logged figures, and the samples as columns."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import bootstrap_interval, correlation, distinct_n, kl_k1, kl_k3, masked_sum, wins
from ..ranks import of_all_ranks
from .experience import TokenStatistics
from .running import RunningFigures
from .samples import Samples

ON_BAR = ("reward", "kl")


def report(module: RunningFigures, stage: str, samples: Samples, statistics: TokenStatistics) -> dict[str, list]:
    """Log means of sampled responses under `stage/`, and return them as columns: prompt, response, reward, kl, ..."""
    rollout, scores = samples.rollout, samples.scores
    mask, logprobs = rollout.response_mask, statistics[:2]
    components = {f"reward/{name}": values for name, values in scores.components.items()}
    k1, k3, lengths = kl_k1(*logprobs), kl_k3(*logprobs), mask.sum(1)
    kl = masked_sum(k1, mask, dim=1)  # (B,) nats per sequence
    per_sequence = {"reward": scores.total, **components, "kl": kl, "kl_k3": masked_sum(k3, mask, dim=1)}
    per_sequence |= {"response_length": lengths.float(), "eos_rate": rollout.ended.float()}
    per_sequence |= {"truncated_rate": 1 - rollout.ended.float()}
    for name, values in per_sequence.items():
        module.log_mean(f"{stage}/{name}", values, prog_bar=name in ON_BAR, batch_size=len(mask))
    gap = (statistics.logprobs - rollout.sampled_logprobs).abs()
    per_token = {"kl_per_token": k1, "kl_k3_per_token": k3, "entropy": statistics.entropy, "sampler_gap": gap}
    for name, values in per_token.items():
        module.log_mean(f"{stage}/{name}", values, mask, batch_size=len(mask))
    module.log_largest(f"{stage}/sampler_gap_max", gap[mask], batch_size=len(mask))
    columns = {"reward": scores.total, **components, "kl": kl, "length": lengths, "ended": rollout.ended}
    return {
        "prompt": samples.prompts,
        "response": samples.responses,
        **{name: values.tolist() for name, values in columns.items()},
    }


class Seen(NamedTuple):
    """What the figures of a whole set of responses are made of."""

    rewards: list[float]
    token_ids: list[list[int]]
    reference_rewards: list[float]
    """Of the reference's responses to the same prompts; empty where there are none."""


def seen(samples: Samples, reference_rewards: list[float] = ()) -> Seen:
    """The part of samples that such figures need."""
    rollout = samples.rollout
    ids = [row[mask].tolist() for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    return Seen(samples.scores.total.tolist(), ids, list(reference_rewards))


def figures_of_all(parts: list[Seen]) -> dict[str, float]:
    """Figures that only all responses of an iteration or evaluation together have, on all ranks; all must call it.

    NaN where one is not defined, such as a correlation with equal lengths.
    """
    every = [part for of_rank in of_all_ranks(parts) for part in of_rank]
    columns = [[row for part in every for row in part[i]] for i in range(3)]
    return dict(_figures(Seen(*columns)))


def _figures(of: Seen) -> Iterator[tuple[str, float]]:
    rewards = torch.tensor(of.rewards, dtype=torch.float64)
    lengths = torch.tensor([len(ids) for ids in of.token_ids])
    yield "reward_std", rewards.std().item() if len(rewards) > 1 else math.nan
    yield "reward_length_correlation", correlation(rewards, lengths).item()
    for n in (1, 2):
        yield f"distinct_{n}", distinct_n(of.token_ids, n)
    if of.reference_rewards:
        yield from _against(rewards, torch.tensor(of.reference_rewards, dtype=torch.float64))


def _against(rewards: Tensor, reference_rewards: Tensor) -> Iterator[tuple[str, float]]:
    won = wins(rewards, reference_rewards)
    low, high = bootstrap_interval(won.sort().values)  # sorted: the number of ranks does not change it
    yield "reference_reward", reference_rewards.mean().item()
    yield "win_rate", won.mean().item()
    yield "win_rate_low", low
    yield "win_rate_high", high
