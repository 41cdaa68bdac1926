"""Rewards per token from scores per response."""

import torch
from torch import Tensor

from ._tensors import check_bool, check_one_per_row, check_same_shape, upcast
from .masking import last_index


def penalize_missing_eos(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Lower the score of responses that ran into the length limit.

    scores − penalty · (not ended)

    Args:
        scores: of the responses, (B,).
        ended: bool, True = the response contains an EOS, (B,).
        penalty: subtracted, so positive; about 1.

    Returns:
        (B,).

    Raises:
        ValueError: if the shapes differ or `ended` is not bool.

    Source:
        the "EOS trick" of Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", detail 23,
        https://arxiv.org/abs/2403.17031. They replace the score by −1; subtracting keeps the order of scores.

    Example:
        >>> import torch
        >>> penalize_missing_eos(torch.tensor([2.0, 2.0]), torch.tensor([True, False]), penalty=1.0)
        tensor([2., 1.])
    """
    check_bool(ended=ended)
    check_same_shape(scores=scores, ended=ended)
    scores = upcast(scores)
    return torch.where(ended, scores, scores - penalty)


def soft_overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """A penalty that grows over the last tokens before the length limit, from 0 to 1.

    clip((|o| − (max_length − buffer)) / buffer, 0, 1)

    Args:
        lengths: tokens of the responses, (B,).
        max_length: the longest response that is possible.
        buffer: how many tokens before that the penalty begins; a fifth of `max_length` in the paper.

    Returns:
        between 0 and 1, (B,); it is subtracted from the score.

    Raises:
        ValueError: if `buffer` is not between 1 and `max_length`.

    Source:
        Yu et al. 2025, "DAPO", equation 13, https://arxiv.org/abs/2503.14476 (there negative, to be added).

    Example:
        >>> import torch
        >>> soft_overlong_penalty(torch.tensor([5, 8, 9, 10]), max_length=10, buffer=4)
        tensor([0.0000, 0.5000, 0.7500, 1.0000])
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"`buffer` must be between 1 and {max_length=}, but is {buffer}.")
    return ((upcast(lengths) - (max_length - buffer)) / buffer).clamp(0, 1)


def kl_shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards per token: a KL penalty on each response token, and the score on the last.

    rewards[:, t] = −kl_coef · kl[:, t] + scores · [t is the last response token]

    Args:
        scores: of the responses, (B,).
        kl: an estimate per token, usually k1, (B, T).
        mask: bool, True = counts, (B, T).
        kl_coef: 0.01 to 0.2.

    Returns:
        (B, T), 0 outside the mask.

    Raises:
        ValueError: if the shapes do not fit, or a row of the mask is all False.

    Source:
        Stiennon et al. 2020, "Learning to summarize from human feedback", section 3.4,
        https://arxiv.org/abs/2009.01325

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, True, False]])
        >>> kl_shaped_rewards(torch.tensor([2.0]), torch.tensor([[1.0, 3.0, 9.0]]), mask, kl_coef=0.1)
        tensor([[-0.1000,  1.7000,  0.0000]])
    """
    check_bool(mask=mask)
    check_same_shape(kl=kl, mask=mask)
    check_one_per_row("kl", kl, scores=scores)
    is_last = torch.arange(mask.shape[1], device=mask.device) == last_index(mask).unsqueeze(1)  # (B, T)
    penalties = torch.where(mask, -kl_coef * upcast(kl), 0.0)
    return penalties + torch.where(is_last, upcast(scores).unsqueeze(1), 0.0)
