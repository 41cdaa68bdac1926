"""Losses of offline preference optimisation, per pair, and what their labels and divergences are made of.

DPO itself is `bradley_terry_loss` of implicit rewards. None reduces: a mean over pairs is the caller's. Notation: w is
the chosen completion of a pair and l the rejected one; u = log π(y|x) − log π_ref(y|x) is the log-ratio of either, and
`difference` is u_w − u_l.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._tensors import MAX_LOG_RATIO, check_same_shape, upcast
from .losses import bradley_terry_loss

# --- divergences ----------------------------------------------------------------------------------------------------


def reverse_kl_link(log_ratio: Tensor) -> Tensor:
    """f′(e^u) of the reverse KL divergence KL(π ‖ π_ref), up to a constant: the implicit reward of DPO is β times this.

    h(u) = u

    Args:
        log_ratio: u, (B,).

    Returns:
        (B,).

    Source:
        Wang et al. 2023, "Beyond Reverse KL", table 1, https://arxiv.org/abs/2309.16240. f(x) = x log x, so
        f′(x) = log x + 1; constants cancel in the difference of two rewards, and are left out here and below.

    Example:
        >>> import torch
        >>> reverse_kl_link(torch.tensor([0.0, 1.0]))
        tensor([0., 1.])
    """
    return upcast(log_ratio)


def forward_kl_link(log_ratio: Tensor) -> Tensor:
    """f′(e^u) of the forward KL divergence KL(π_ref ‖ π).

    h(u) = −e^−u,  −u at most `MAX_LOG_RATIO`; beyond it there is no gradient

    Args:
        log_ratio: u, (B,).

    Returns:
        below 0, (B,).

    Source:
        Wang et al. 2023, "Beyond Reverse KL", table 1, https://arxiv.org/abs/2309.16240. f(x) = −log x.

    Example:
        >>> import torch
        >>> forward_kl_link(torch.tensor([0.0, 1.0]))
        tensor([-1.0000, -0.3679])
    """
    return -_bounded_exp(-upcast(log_ratio))


def jensen_shannon_link(log_ratio: Tensor) -> Tensor:
    """f′(e^u) of the Jensen-Shannon divergence.

    h(u) = u − softplus(u) + log 2 = log σ(u) + log 2

    Args:
        log_ratio: u, (B,).

    Returns:
        below log 2, (B,).

    Source:
        Wang et al. 2023, "Beyond Reverse KL", table 1, https://arxiv.org/abs/2309.16240. f′(x) = log(2x / (1 + x)).

    Example:
        >>> import torch
        >>> jensen_shannon_link(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.3799])
    """
    return logsigmoid(upcast(log_ratio)) + math.log(2)


def alpha_link(log_ratio: Tensor, alpha: float) -> Tensor:
    """f′(e^u) of the α-divergence, which lies between the reverse KL (α → 0) and the forward KL (α → 1).

    h(u) = (1 − e^−αu) / α,  −αu at most `MAX_LOG_RATIO`; beyond it there is no gradient

    Args:
        log_ratio: u, (B,).
        alpha: 0.1 to 0.9.

    Returns:
        below 1 / α, (B,).

    Raises:
        ValueError: if `alpha` is not positive.

    Source:
        Wang et al. 2023, "Beyond Reverse KL", table 1, https://arxiv.org/abs/2309.16240

    Example:
        >>> import torch
        >>> alpha_link(torch.tensor([0.0, 1.0]), alpha=0.5)
        tensor([0.0000, 0.7869])
    """
    if alpha <= 0:
        raise ValueError(f"`alpha` must be positive, but is {alpha}.")
    return (1 - _bounded_exp(-alpha * upcast(log_ratio))) / alpha


def _bounded_exp(x: Tensor) -> Tensor:
    return x.clamp(max=MAX_LOG_RATIO).exp()


# --- losses ---------------------------------------------------------------------------------------------------------


def ipo_loss(difference: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation: the log-ratios of a pair shall differ by a given amount, and no more.

    loss = (difference − 1 / (2β))²

    Args:
        difference: u_w − u_l of sums of log-probs over the tokens, as in the paper, (B,). (TRL's IPO takes means over
            the tokens, so its β is another.)
        beta: τ in the paper, 0.01 to 1.

    Returns:
        (B,).

    Source:
        Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", equation 17,
        https://arxiv.org/abs/2310.12036

    Example:
        >>> import torch
        >>> ipo_loss(torch.tensor([0.0, 5.0, 6.0]), beta=0.1)
        tensor([25.,  0.,  1.])
    """
    return (upcast(difference) - 1 / (2 * beta)).square()


def hinge_preference_loss(difference: Tensor, beta: float) -> Tensor:
    """Hinge loss: a pair counts until its rewards differ by 1.

    loss = max(0, 1 − β · difference)

    Args:
        difference: u_w − u_l, (B,).
        beta: 0.05 to 1; the margin of the log-ratios is 1 / β.

    Returns:
        at least 0, (B,).

    Source:
        Zhao et al. 2023, "SLiC-HF", https://arxiv.org/abs/2305.10425, where δ = 1 / β and log-probs stand without a
        reference; with one it is "hinge-norm" of Liu et al. 2023, https://arxiv.org/abs/2309.06657

    Example:
        >>> import torch
        >>> hinge_preference_loss(torch.tensor([-5.0, 5.0, 20.0]), beta=0.1)
        tensor([1.5000, 0.5000, 0.0000])
    """
    return torch.relu(1 - beta * upcast(difference))


def log_odds(mean_logprobs: Tensor) -> Tensor:
    """Log-odds of the geometric mean P of a completion's token probabilities.

    log(P / (1 − P)) = p − log(1 − e^p),  p = log P, at most −eps of its dtype, so that P = 1 is finite

    Args:
        mean_logprobs: p, 0 or less, (B,).

    Returns:
        (B,).

    Source:
        Hong et al. 2024, "ORPO", equation 4, https://arxiv.org/abs/2403.07691; log(1 − e^p) by one of two forms, after
        Mächler 2012, https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf

    Example:
        >>> import torch
        >>> log_odds(torch.tensor([0.5, 0.75]).log())
        tensor([0.0000, 1.0986])
    """
    p = upcast(mean_logprobs)
    p = p.clamp(max=-torch.finfo(p.dtype).eps)
    return p - torch.where(p > -math.log(2), (-p.expm1()).log(), (-p.exp()).log1p())


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """ORPO's term beside the likelihood: the odds of the chosen completion against those of the rejected.

    loss = −log σ(log odds(chosen) − log odds(rejected))

    Args:
        chosen: mean log-prob per token of the chosen completions, (B,).
        rejected: of the rejected, (B,).

    Returns:
        (B,).

    Raises:
        ValueError: if the shapes differ.

    Source:
        Hong et al. 2024, "ORPO", equation 7, https://arxiv.org/abs/2403.07691

    Example:
        >>> import torch
        >>> odds_ratio_loss(torch.tensor([0.75]).log(), torch.tensor([0.5]).log())
        tensor([0.2877])
    """
    check_same_shape(chosen=chosen, rejected=rejected)
    return bradley_terry_loss(log_odds(chosen), log_odds(rejected))


# --- labels ---------------------------------------------------------------------------------------------------------


def soft_preference_loss(loss: Tensor, swapped_loss: Tensor, preference: Tensor) -> Tensor:
    """Any loss of pairs with a share of people as the label, instead of a verdict.

    p · l(w, l) + (1 − p) · l(l, w),  p = preference

    Of `bradley_terry_loss` it is `soft_bradley_terry_loss`.

    Args:
        loss: of the pairs as they are, (B,).
        swapped_loss: of the pairs with chosen and rejected exchanged, (B,).
        preference: share of people who prefer the chosen completion, (B,): 0 to 1, or outside after
            `unbiased_preference`.

    Returns:
        (B,).

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import torch
        >>> soft_preference_loss(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0]), torch.tensor([1.0, 0.75]))
        tensor([1.0000, 1.5000])
    """
    check_same_shape(loss=loss, swapped_loss=swapped_loss, preference=preference)
    return preference * loss + (1 - preference) * swapped_loss


def smoothed_preference(preference: Tensor, flip_rate: float) -> Tensor:
    """The label after a share of the verdicts was flipped: conservative, since no pair is certain any more.

    p (1 − ε) + (1 − p) ε

    Args:
        preference: share of people who prefer the chosen completion, 0 to 1, (B,).
        flip_rate: ε, share of wrong labels that the data is thought to have, 0 to 0.3.

    Returns:
        (B,).

    Source:
        Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO" (cDPO), equation 3,
        https://ericmitchell.ai/cdpo.pdf

    Example:
        >>> import torch
        >>> smoothed_preference(torch.tensor([1.0, 0.5]), flip_rate=0.1)
        tensor([0.9000, 0.5000])
    """
    return preference * (1 - flip_rate) + (1 - preference) * flip_rate


def unbiased_preference(preference: Tensor, flip_rate: float) -> Tensor:
    """The label before a share of the verdicts was flipped: with it the loss is, in expectation, that of clean labels.

    (p − ε) / (1 − 2ε),  which undoes `smoothed_preference`

    Args:
        preference: share of people who prefer the chosen completion, as observed, 0 to 1, (B,).
        flip_rate: ε, share of wrong labels in the data, 0 to 0.3, below 0.5.

    Returns:
        (B,); above 1 for p = 1, and below 0 for p = 0.

    Raises:
        ValueError: if `flip_rate` is 0.5 or more, when labels say nothing.

    Source:
        Chowdhury et al. 2024, "Provably Robust DPO", https://arxiv.org/abs/2403.00409

    Example:
        >>> import torch
        >>> unbiased_preference(torch.tensor([1.0, 0.5]), flip_rate=0.1)
        tensor([1.1250, 0.5000])
    """
    if flip_rate >= 0.5:
        raise ValueError(f"`flip_rate` must be below 0.5, but is {flip_rate}.")
    return (preference - flip_rate) / (1 - 2 * flip_rate)


# --- what is watched ------------------------------------------------------------------------------------------------
