"""KTO: single completions that people called good or bad, judged by how far the policy has moved on average."""

import torch
from torch import Tensor

from ._tensors import check_bool, check_same_shape, upcast
from .masking import Reduce, identity, masked_sum


def kto_reference_point(log_ratio: Tensor, mask: Tensor, reduce: Reduce = identity) -> Tensor:
    """How far the policy has moved from the reference, from completions that belong to other prompts; over all ranks.

    z = max(0, 1/n Σ log π(y'|x) / π_ref(y'|x)),  y' the completion of another prompt than x

    It stands for KL(π ‖ π_ref), which is never negative, but it is a biased estimate: π did not sample the y'.

    Args:
        log_ratio: of the completions y', sums over their tokens, (B,).
        mask: bool, True = counts, (B,).
        reduce: sums a tensor over all ranks.

    Returns:
        a scalar, without gradient; 0 if nothing counts.

    Raises:
        ValueError: if the shapes differ or `mask` is not bool.

    Source:
        Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", section 4.1,
        https://arxiv.org/abs/2402.01306

    Example:
        >>> import torch
        >>> kto_reference_point(torch.tensor([3.0, -1.0, 9.0]), torch.tensor([True, True, False]))
        tensor(1.)
    """
    sums = torch.stack([masked_sum(log_ratio.detach(), mask).double(), mask.sum().double()])
    total, count = reduce(sums)
    return (total / count.clamp(min=1)).clamp(min=0).to(upcast(log_ratio).dtype)


def kto_loss(
    log_ratio: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Loss of completions that are good or bad by themselves, per completion.

    desirable:    loss = w_D (1 − σ(β (u − z)))
    undesirable:  loss = w_U (1 − σ(β (z − u)))

    u = log π(y|x) / π_ref(y|x). The gradient is largest at u = z and vanishes far from it: what the policy has learned
    already, and what it cannot be taught, count little.

    Args:
        log_ratio: u, sums over the tokens of each completion, (B,).
        desirable: bool, True = a good completion, (B,).
        kl: z, from `kto_reference_point`; no gradient flows into it. A scalar.
        beta: usually 0.1; 0.01 to 0.1 for a reference that was fine-tuned on the same data, 0.1 to 0.5 for one that is
            aligned already.
        desirable_weight: w_D. With n_D good and n_U bad completions, w_D n_D / (w_U n_U) should be 1 to 1.5.
        undesirable_weight: w_U, usually 1.

    Returns:
        between 0 and the weight, (B,).

    Raises:
        ValueError: if the shapes differ, `desirable` is not bool, or `kl` is not a scalar.

    Source:
        Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", equations 7 to 9,
        https://arxiv.org/abs/2402.01306. Their loss has the constant λ_y where this has w, and so is the same.

    Example:
        >>> import torch
        >>> log_ratio, desirable = torch.tensor([5.0, 5.0, 1.0]), torch.tensor([True, False, True])
        >>> kto_loss(log_ratio, desirable, kl=torch.tensor(1.0), beta=0.5)
        tensor([0.1192, 0.8808, 0.5000])
    """
    check_same_shape(log_ratio=log_ratio, desirable=desirable)
    check_bool(desirable=desirable)
    if kl.dim() != 0:
        raise ValueError(f"`kl` must be a scalar, one for all completions, but has shape {tuple(kl.shape)}.")
    advance = beta * (upcast(log_ratio) - kl.detach())  # (B,)
    # 1 − σ(x) = σ(−x), which keeps its digits where σ(x) is near 1.
    return torch.where(desirable, desirable_weight * (-advance).sigmoid(), undesirable_weight * advance.sigmoid())
