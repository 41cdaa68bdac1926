"""KL divergence between the policy and the reference: estimators per token, and the adaptive coefficient.

All estimate KL(π ‖ π_ref) from tokens sampled from π, with log r = ref_logprobs − logprobs. k1 is unbiased and noisy,
k2 is biased and calm, k3 is unbiased, calm and never negative.
"""

import torch
from torch import Tensor

from ._tensors import bounded_log_ratio, check_same_shape, upcast
from .logprobs import CHUNK


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k1 estimator of KL(π ‖ π_ref), per token.

    k1 = −log r = logprobs − ref_logprobs

    Args:
        logprobs: of the sampled tokens under the policy, (B, T).
        ref_logprobs: of the same tokens under the reference, (B, T).

    Returns:
        (B, T); single tokens may be negative.

    Raises:
        ValueError: if the shapes differ.

    Source:
        John Schulman, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html

    Example:
        >>> import torch
        >>> kl_k1(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
        tensor([ 0.5000, -1.0000])
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return upcast(logprobs) - upcast(ref_logprobs)


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k2 estimator of KL(π ‖ π_ref), per token; its expectation is an f-divergence that agrees near π = π_ref.

    k2 = ½ (log r)²

    Args:
        logprobs: of the sampled tokens under the policy, (B, T).
        ref_logprobs: of the same tokens under the reference, (B, T).

    Returns:
        at least 0, (B, T).

    Raises:
        ValueError: if the shapes differ.

    Source:
        John Schulman, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html

    Example:
        >>> import torch
        >>> kl_k2(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
        tensor([0.1250, 0.5000])
    """
    return 0.5 * kl_k1(logprobs, ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimator of KL(π ‖ π_ref), per token.

    k3 = r − 1 − log r,  log r at most `MAX_LOG_RATIO`

    Args:
        logprobs: of the sampled tokens under the policy, (B, T).
        ref_logprobs: of the same tokens under the reference, (B, T).

    Returns:
        at least 0, (B, T).

    Raises:
        ValueError: if the shapes differ.

    Source:
        John Schulman, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html

    Example:
        >>> import torch
        >>> kl_k3(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
        tensor([0.1065, 0.7183])
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = bounded_log_ratio(ref_logprobs, logprobs)
    return log_ratio.expm1() - log_ratio


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(π ‖ π_ref) of the next token, over the whole vocabulary, so without the noise of samples.

    KL = Σ_v π(v) (log π(v) − log π_ref(v)),  π = softmax(logits)

    Args:
        logits: of the policy, (N, V); -inf for tokens that cannot come is fine.
        ref_logits: of the reference, (N, V).

    Returns:
        at least 0, up to rounding, (N,).

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import torch
        >>> exact_kl(torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log())
        tensor([0.0000, 0.3681])
    """
    check_same_shape(logits=logits, ref_logits=ref_logits)
    rows = max(1, CHUNK // logits.shape[-1])  # float32 copies never have the size of all logits
    return torch.cat([_kl(*both) for both in zip(logits.split(rows), ref_logits.split(rows), strict=True)])


def _kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    logprobs, ref_logprobs = upcast(logits).log_softmax(-1), upcast(ref_logits).log_softmax(-1)
    impossible = logprobs.isneginf()  # 0 · log 0 = 0
    return (logprobs.exp() * (logprobs - ref_logprobs).masked_fill(impossible, 0.0)).sum(-1)


def adaptive_kl_coef(
    kl_coef: float, kl: float, target: float, horizon: float, num_samples: int, error_clip: float = 0.2
) -> float:
    """The next KL coefficient: larger when the policy is further from the reference than the target, else smaller.

    kl_coef · (1 + clip(kl / target − 1, ±error_clip) · num_samples / horizon)

    For a fixed coefficient, do not call it.

    Args:
        kl_coef: the coefficient used so far, 0.01 to 0.2.
        kl: measured KL per response (summed over its tokens, mean over all ranks), in nats.
        target: the wanted KL per response, 0.1 to 6 nats.
        horizon: responses in which a clipped error changes the coefficient by about `error_clip`, 10,000.
        num_samples: responses since the last call, over all ranks.
        error_clip: largest relative error that counts, 0.2 in the paper.

    Returns:
        a float.

    Raises:
        ValueError: if `target` or `horizon` is not positive.

    Source:
        Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2,
        https://arxiv.org/abs/1909.08593. The paper's K_β is here num_samples / horizon.

    Example:
        >>> round(adaptive_kl_coef(0.1, kl=12.0, target=6.0, horizon=10_000, num_samples=500), 4)
        0.101
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"`target` and `horizon` must be positive, but are {target} and {horizon}.")
    error = min(max(kl / target - 1, -error_clip), error_clip)
    return kl_coef * (1 + error * num_samples / horizon)
