"""Advantages without a value model: each response is held against the others that were sampled for the same prompt.

Responses of a group stand next to each other: rows 0 to G − 1 are the first group, and so on.
"""

import torch
from torch import Tensor

from ._tensors import check_bool, check_same_shape, upcast


def grouped(scores: Tensor, group_size: int) -> Tensor:
    """Scores (B,) as (B / G, G), one row per prompt.

    Raises:
        ValueError: if `scores` has another shape, the group size does not divide B, or is below 2: a group of one has
            nobody to be compared with.

    Example:
        >>> import torch
        >>> grouped(torch.tensor([1.0, 2.0, 3.0, 4.0]), group_size=2)
        tensor([[1., 2.],
                [3., 4.]])
    """
    if group_size < 2:
        raise ValueError(f"`group_size` must be at least 2 to compare responses of one prompt, but is {group_size}.")
    if scores.dim() != 1 or len(scores) % group_size:
        raise ValueError(f"`scores` must be (B,) with B a multiple of {group_size=}, but is {tuple(scores.shape)}.")
    return upcast(scores).view(-1, group_size)


def group_centered(scores: Tensor, group_size: int) -> Tensor:
    """How much better than its group's mean each response is.

    A_i = R_i − mean_j R_j,  j over the group

    Args:
        scores: (B,).
        group_size: G, 4 to 64.

    Returns:
        (B,); sums to 0 in each group.

    Raises:
        ValueError: see `grouped`.

    Source:
        Liu et al. 2025, "Understanding R1-Zero-Like Training" (Dr. GRPO), https://arxiv.org/abs/2503.20783

    Example:
        >>> import torch
        >>> group_centered(torch.tensor([1.0, 3.0, 5.0, 5.0]), group_size=2)
        tensor([-1.,  1.,  0.,  0.])
    """
    groups = grouped(scores, group_size)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()


def group_normalized(scores: Tensor, group_size: int, eps: float = 1e-4) -> Tensor:
    """How many standard deviations of its group better than the group's mean each response is.

    A_i = (R_i − mean_j R_j) / (std_j R_j + eps),  std with G − 1 in the denominator

    Args:
        scores: (B,).
        group_size: G, 4 to 64.
        eps: keeps a group whose rewards are all equal at 0.

    Returns:
        (B,); sums to 0 in each group.

    Raises:
        ValueError: see `grouped`.

    Source:
        Shao et al. 2024, "DeepSeekMath" (GRPO), section 4.1.2, https://arxiv.org/abs/2402.03300

    Example:
        >>> import torch
        >>> group_normalized(torch.tensor([1.0, 3.0, 5.0, 5.0]), group_size=2)
        tensor([-0.7071,  0.7071,  0.0000,  0.0000])
    """
    groups = grouped(scores, group_size)
    centered = groups - groups.mean(dim=1, keepdim=True)
    return (centered / (groups.std(dim=1, keepdim=True) + eps)).flatten()


def leave_one_out(scores: Tensor, group_size: int) -> Tensor:
    """How much better than the mean of the *others* of its group each response is.

    A_i = R_i − mean_{j≠i} R_j = G / (G − 1) · (R_i − mean_j R_j)

    The baseline does not depend on the response itself, so the policy gradient is unbiased.

    Args:
        scores: (B,).
        group_size: G, 2 to 8.

    Returns:
        (B,); sums to 0 in each group.

    Raises:
        ValueError: see `grouped`.

    Source:
        Ahmadian et al. 2024, "Back to Basics" (RLOO), equation 6, https://arxiv.org/abs/2402.14740

    Example:
        >>> import torch
        >>> leave_one_out(torch.tensor([1.0, 3.0, 8.0]), group_size=3)
        tensor([-4.5000, -1.5000,  6.0000])
    """
    return group_centered(scores, group_size) * (group_size / (group_size - 1))


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """What is still to come at each token.

    G_t = Σ_{k≥0} γ^k rewards_{t+k},  over the tokens that count

    Args:
        rewards: (B, T).
        mask: bool, True = counts, from the first token on without a gap, (B, T).
        gamma: discount, usually 1.

    Returns:
        (B, T), 0 outside the mask.

    Raises:
        ValueError: if the shapes differ or `mask` is not bool.

    Source:
        Hu et al. 2025, "REINFORCE++", https://arxiv.org/abs/2501.03262, whitens these over the batch.

    Example:
        >>> import torch
        >>> returns_to_go(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, True]]), gamma=0.5)
        tensor([[3., 4., 4.]])
    """
    check_bool(mask=mask)
    check_same_shape(rewards=rewards, mask=mask)
    rewards = torch.where(mask, upcast(rewards), 0.0)
    to_go, after = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        after = rewards[:, t] + gamma * after  # (B,)
        to_go[:, t] = after
    return torch.where(mask, to_go, 0.0)


def has_spread(scores: Tensor, group_size: int) -> Tensor:
    """Whether the scores of each group differ; where they do not, every advantage is 0 and nothing is learned.

    Args:
        scores: (B,).
        group_size: G.

    Returns:
        bool, (B / G,).

    Raises:
        ValueError: see `grouped`.

    Example:
        >>> import torch
        >>> has_spread(torch.tensor([1.0, 3.0, 5.0, 5.0]), group_size=2)
        tensor([ True, False])
    """
    groups = grouped(scores, group_size)
    return groups.amax(dim=1) > groups.amin(dim=1)
