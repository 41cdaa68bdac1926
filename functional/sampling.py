"""Drawing tokens."""

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256  # tokens


def invert_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes a uniform number: one number per draw.

    token = min { v : Σ_{w ≤ v} p_w > u · Σ_w p_w }

    A token of probability 0 has no interval of its own, so it never comes. The sum is taken over blocks of 256 tokens,
    and token by token, in float64, within the one that is hit: a cumulative sum over the whole vocabulary takes many
    times as long (benchmarks/NOTES.md). A block's sum is in the dtype of the probabilities, so its interval is as exact
    as they are.

    Args:
        probabilities: not negative, their sum is positive but need not be 1, (B, V).
        uniform: in [0, 1), float64, (B, 1).

    Returns:
        token ids, (B, 1).

    Example:
        >>> import torch
        >>> invert_cdf(torch.tensor([[0.25, 0.0, 0.75]]).expand(2, 3), torch.tensor([[0.2], [0.25]]).double())
        tensor([[0],
                [2]])
    """
    lacking = -probabilities.shape[-1] % BLOCK
    whole = pad(probabilities, (0, lacking)) if lacking else probabilities  # `pad` copies in any case
    blocks = whole.unflatten(-1, (-1, BLOCK))  # (B, N, 256)
    sums = blocks.sum(-1)
    block, rest = _passed(sums, uniform * sums.sum(-1, keepdim=True, dtype=torch.float64))
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0]
    token, _ = _passed(inside, rest)
    return block * BLOCK + token


def _passed(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative sum of weights (B, N) passes a target (B, 1), and what of it the weights before leave.

    A target that rounding has put at the end or beyond is within the last weight that is not 0.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    at = torch.searchsorted(cumulative, torch.minimum(target, total.nextafter(torch.zeros_like(total))), right=True)
    before = cumulative.gather(1, at) - weights.gather(1, at)
    return at, (target - before).clamp(min=0)
