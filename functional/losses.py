"""Losses, per token or per pair. None reduces: `masked_mean` does, with the mask of the responses.

Under the mask, log-probs and advantages may be anything; values and returns should be finite, since a squared error
passes NaN on to the gradient.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._tensors import bounded_log_ratio, check_same_shape, upcast
from .masking import Reduce, identity, masked_mean, masked_mean_and_var


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate objective, negated, per token.

    loss = −min(ratio · A, clip(ratio, 1 − clip_range, 1 + clip_range_high) · A),
    ratio = exp(logprobs − old_logprobs)

    Args:
        logprobs: under the policy that learns, (B, T).
        old_logprobs: under the policy that sampled, without gradient, (B, T).
        advantages: without gradient, (B, T).
        clip_range: usually 0.2.
        clip_range_high: the bound above, 0.28 in DAPO; None is `clip_range`, as in PPO.

    Returns:
        (B, T).

    Raises:
        ValueError: if the shapes differ.

    Source:
        Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7, https://arxiv.org/abs/1707.06347;
        two bounds: Yu et al. 2025, "DAPO", equation 10, https://arxiv.org/abs/2503.14476

    Example:
        >>> import torch
        >>> logprobs, old_logprobs = torch.tensor([0.9, 0.9]).log(), torch.tensor([0.9, 0.6]).log()
        >>> clipped_policy_loss(logprobs, old_logprobs, torch.tensor([1.0, 1.0]), clip_range=0.2)
        tensor([-1.0000, -1.2000])
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ratio = bounded_log_ratio(logprobs, old_logprobs).exp()
    advantages = upcast(advantages)
    return -torch.minimum(ratio * advantages, _clip(ratio, clip_range, clip_range_high) * advantages)


def is_clipped(
    logprobs: Tensor, old_logprobs: Tensor, clip_range: float, clip_range_high: float | None = None
) -> Tensor:
    """Whether the ratio of each token lies outside the clip range, as 0 or 1, so that its mean is the clip fraction.

    ratio < 1 − clip_range or ratio > 1 + clip_range_high,  ratio = exp(logprobs − old_logprobs)

    Args:
        logprobs: under the policy that learns, (B, T).
        old_logprobs: under the policy that sampled, (B, T).
        clip_range: usually 0.2.
        clip_range_high: the bound above; None is `clip_range`.

    Returns:
        0 or 1 as floats, (B, T).

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import torch
        >>> is_clipped(torch.tensor([0.0, 0.5, -0.5]), torch.zeros(3), clip_range=0.2)
        tensor([0., 1., 1.])
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    ratio = bounded_log_ratio(logprobs, old_logprobs).exp()
    return (_clip(ratio, clip_range, clip_range_high) != ratio).to(ratio.dtype)


def _clip(ratio: Tensor, low: float, high: float | None) -> Tensor:
    return ratio.clamp(1 - low, 1 + (low if high is None else high))


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """The mean log-probability of each response's tokens, at each of them.

    s_t = (1 / |o|) Σ_k logprobs_k, for every token t

    With these in the place of log-probabilities per token, the ratio of policies is GSPO's: the geometric mean of a
    response's ratios.

    Args:
        logprobs: (B, T).
        mask: bool, True = counts, (B, T).

    Returns:
        (B, T), equal within a row.

    Source:
        Zheng et al. 2025, "Group Sequence Policy Optimization", equation 7, https://arxiv.org/abs/2507.18071

    Example:
        >>> import torch
        >>> sequence_logprobs(torch.tensor([[-1.0, -3.0, -9.0]]), torch.tensor([[True, True, False]]))
        tensor([[-2., -2., -2.]])
    """
    return masked_mean(logprobs, mask, dim=1).unsqueeze(1).expand(mask.shape)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None) -> Tensor:
    """Squared error of the value, which gains nothing by moving far from the old value, per token.

    loss = ½ max((values − returns)², (old_values + clip(values − old_values, ±clip_range) − returns)²)

    Args:
        values: of the value function that learns, (B, T).
        old_values: at the time of sampling, without gradient, (B, T).
        returns: without gradient, (B, T).
        clip_range: usually 0.2, in units of the return; None for the plain squared error.

    Returns:
        (B, T).

    Raises:
        ValueError: if the shapes differ.

    Source:
        Not in the PPO paper: OpenAI baselines, ppo2/model.py,
        https://github.com/openai/baselines/blob/ea25b9e8/baselines/ppo2/model.py#L68-L75

    Example:
        >>> import torch
        >>> clipped_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), clip_range=0.5)
        tensor([0.1250])
    """
    check_same_shape(values=values, old_values=old_values, returns=returns)
    values, old_values, returns = upcast(values), upcast(old_values), upcast(returns)
    unclipped = (values - returns).square()
    if clip_range is None:
        return 0.5 * unclipped
    clipped = (old_values + (values - old_values).clamp(-clip_range, clip_range) - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce = identity) -> Tensor:
    """Share of the variance of the returns that the values explain, over all ranks.

    1 − Var(returns − values) / Var(returns)

    Args:
        values: (B, T).
        returns: (B, T).
        mask: bool, True = counts, (B, T).
        reduce: sums a tensor over all ranks.

    Returns:
        a scalar: 1 is perfect, 0 is no better than a constant, NaN if all returns are equal.

    Raises:
        ValueError: if the shapes differ or `mask` is not bool.

    Example:
        >>> import torch
        >>> values, returns = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])
        >>> explained_variance(values, returns, torch.tensor([True, True, True]))
        tensor(0.6667)
    """
    check_same_shape(values=values, returns=returns, mask=mask)
    _, unexplained = masked_mean_and_var(upcast(returns) - upcast(values), mask, reduce)
    _, total = masked_mean_and_var(returns, mask, reduce)
    return torch.where(total > 0, 1 - unexplained / total, torch.nan)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Negative log-likelihood that the chosen text wins, per pair.

    loss = −log σ(chosen − rejected − margin)

    Args:
        chosen: scores of the preferred texts, (B,).
        rejected: scores of the others, (B,).
        margin: by how much the chosen should win, 0 or more, (B,); None for 0.

    Returns:
        (B,).

    Raises:
        ValueError: if the shapes differ.

    Source:
        Ouyang et al. 2022, "Training language models to follow instructions with human feedback", equation 1,
        https://arxiv.org/abs/2203.02155; with margin Touvron et al. 2023, "Llama 2", equation 2,
        https://arxiv.org/abs/2307.09288

    Example:
        >>> import torch
        >>> bradley_terry_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.0]))
        tensor([0.6931, 0.1269])
    """
    check_same_shape(chosen=chosen, rejected=rejected)
    return -logsigmoid(_minus_margin(upcast(chosen) - upcast(rejected), margin))


def soft_bradley_terry_loss(difference: Tensor, preference: Tensor, margin: Tensor | None = None) -> Tensor:
    """Cross-entropy of the modelled preference against a share of raters instead of a verdict, per pair.

    loss = −p log σ(d) − (1 − p) log σ(−d),  d = difference − margin,  p = preference

    At p = 1 it is `bradley_terry_loss`. The minimum lies at σ(d) = p.

    Args:
        difference: score of the first text minus that of the second, any shape.
        preference: share of those who prefer the first, 0 to 1, the same shape.
        margin: by how much the first should win, so order pairs by preference to use it, the same shape; None for 0.

    Returns:
        the shape of `difference`.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import torch
        >>> soft_bradley_terry_loss(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.5]))
        tensor([0.1269, 1.1269])
    """
    check_same_shape(difference=difference, preference=preference)
    difference, preference = _minus_margin(upcast(difference), margin), upcast(preference)
    return -preference * logsigmoid(difference) - (1 - preference) * logsigmoid(-difference)


def _minus_margin(difference: Tensor, margin: Tensor | None) -> Tensor:
    if margin is None:
        return difference
    check_same_shape(difference=difference, margin=margin)
    return difference - upcast(margin)
