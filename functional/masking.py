"""Masks over tokens, and sums, means and whitening over what they let through.

Statistics take a `reduce` function that sums a tensor over all ranks, in place or not. With it they are global: every
rank gets the same mean and variance, as if all data lay on one. All ranks must call the function together.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._tensors import check_bool, check_same_shape, upcast

Reduce = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """The `reduce` of a single process."""
    return x


def response_mask(tokens: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """Which response tokens count: all up to the first EOS, and that EOS.

    mask[:, t] = no EOS among tokens[:, :t]; so a pad token equal to the EOS token is safe.

    Args:
        tokens: generated token ids, prompt excluded, (B, T).
        eos_token_ids: every id that ends a response; empty means that nothing does.

    Returns:
        bool, (B, T).

    Example:
        >>> import torch
        >>> response_mask(torch.tensor([[5, 2, 2], [5, 6, 7]]), eos_token_ids=[2])
        tensor([[ True,  True, False],
                [ True,  True,  True]])
    """
    eos = torch.tensor(list(eos_token_ids), dtype=tokens.dtype, device=tokens.device)
    is_eos = torch.isin(tokens, eos).long()
    return is_eos.cumsum(dim=-1) - is_eos == 0


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that start at 0 on the first real token, however much padding stands before it.

    position_ids[:, t] = max(0, Σ_{s≤t} attention_mask[:, s] − 1)

    Args:
        attention_mask: bool or 0/1, True = a real token, (B, L).

    Returns:
        int64, (B, L).

    Example:
        >>> import torch
        >>> position_ids(torch.tensor([[0, 0, 1, 1, 1]]))
        tensor([[0, 0, 0, 1, 2]])
    """
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def last_index(mask: Tensor) -> Tensor:
    """The index of the last True of each row.

    Args:
        mask: bool, (B, L).

    Returns:
        int64, (B,).

    Raises:
        ValueError: if a row has no True.

    Example:
        >>> import torch
        >>> last_index(torch.tensor([[True, True, False], [False, False, True]]))
        tensor([1, 2])
    """
    check_bool(mask=mask)
    if not mask.any(dim=-1).all():
        row = int((~mask.any(dim=-1)).nonzero()[0])
        raise ValueError(f"`mask` must be True at least once in every row, but row {row} is all False.")
    return (mask * torch.arange(mask.shape[-1], device=mask.device)).amax(dim=-1)  # (B,)


def _fill_masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask is True and 0 elsewhere; unlike `x * mask` it stops NaN, inf and their gradients."""
    check_bool(mask=mask)
    check_same_shape(x=x, mask=mask)
    return torch.where(mask, upcast(x), 0.0)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """The sum of the entries that count.

    Args:
        x: any shape.
        mask: bool, True = counts, the shape of `x`.
        dim: the dimension to sum over; None for all.

    Returns:
        a scalar, or the shape of `x` without `dim`.

    Example:
        >>> import torch
        >>> masked_sum(torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(3.)
    """
    return _fill_masked(x, mask).sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """The mean of the entries that count; 0 if none does.

    With `dim=None`, the mean per token of this batch; for one over several batches or ranks divide their sums once.

    Args:
        x, mask: as in `masked_sum`.
        dim: the dimension to average over; None for all.

    Returns:
        a scalar, or the shape of `x` without `dim`.

    Example:
        >>> import torch
        >>> masked_mean(torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(1.5000)
    """
    return masked_sum(x, mask, dim) / mask.sum(dim=dim).clamp(min=1)


def masked_mean_and_var(x: Tensor, mask: Tensor, reduce: Reduce = identity) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the entries that count, over all ranks; both 0 if none does.

    mean = Σ x / n,  var = Σ (x − mean)² / n

    Two passes, since Σx²/n − mean² loses all digits when the mean is large.

    Args:
        x: any shape.
        mask: bool, True = counts, the shape of `x`.
        reduce: sums a tensor over all ranks; called twice.

    Returns:
        two scalars.

    Example:
        >>> import torch
        >>> masked_mean_and_var(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]))
        (tensor(2.), tensor(1.))
    """
    x = _fill_masked(x, mask)
    total, count = reduce(torch.stack([x.sum(), mask.sum().to(x.dtype)])).unbind()
    count = count.clamp(min=1)
    mean = total / count
    return mean, reduce(masked_sum((x - mean).square(), mask)) / count


def whiten(x: Tensor, mask: Tensor, reduce: Reduce = identity, eps: float = 1e-8) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1 over the entries that count, on all ranks together.

    whiten(x) = (x − mean) / √(var + eps)

    Args:
        x, mask, reduce: as in `masked_mean_and_var`.
        eps: keeps constant input at 0 instead of dividing by 0.

    Returns:
        the shape of `x`, 0 outside the mask.

    Example:
        >>> import torch
        >>> whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]))
        tensor([-1.,  1.,  0.])
    """
    mean, var = masked_mean_and_var(x, mask, reduce)
    return torch.where(mask, (_fill_masked(x, mask) - mean) * (var + eps).rsqrt(), 0.0)


def scale_to_unit_variance(x: Tensor, mask: Tensor, reduce: Reduce = identity, eps: float = 1e-8) -> Tensor:
    """Scale to standard deviation 1 around the mean, which stays, over the entries that count, on all ranks together.

    scale(x) = mean + (x − mean) / √(var + eps)

    Args:
        x, mask, reduce, eps: as in `whiten`.

    Returns:
        the shape of `x`, 0 outside the mask.

    Example:
        >>> import torch
        >>> scale_to_unit_variance(torch.tensor([10.0, 14.0, 99.0]), torch.tensor([True, True, False]))
        tensor([11., 13.,  0.])
    """
    mean, var = masked_mean_and_var(x, mask, reduce)
    return torch.where(mask, mean + (_fill_masked(x, mask) - mean) * (var + eps).rsqrt(), 0.0)
