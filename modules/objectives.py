"""What to make of a pair of completions: DPO, IPO, hinge, SimPO, CPO, ORPO.

The class is the choice: `--model.objective IPO --model.objective.beta 0.1`.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from ..functional import (
    alpha_link,
    bradley_terry_loss,
    forward_kl_link,
    hinge_preference_loss,
    ipo_loss,
    jensen_shannon_link,
    log_odds,
    odds_ratio_loss,
    reverse_kl_link,
)
from .checks import require


class Likelihoods(NamedTuple):
    """What policy and reference say of B completions."""

    logprobs: Tensor
    """(B,) log π(y|x), summed over the tokens."""
    ref_logprobs: Tensor
    """(B,) log π_ref(y|x), without gradient; 0 for objectives without a reference."""
    lengths: Tensor
    """(B,) number of tokens."""

    @property
    def log_ratios(self) -> Tensor:
        """(B,) log π(y|x) − log π_ref(y|x)."""
        return self.logprobs - self.ref_logprobs

    @property
    def mean_logprobs(self) -> Tensor:
        """(B,) log π(y|x) per token."""
        return self.logprobs / self.lengths


# --- divergences ----------------------------------------------------------------------------------------------------


class Divergence(ABC):
    """From which f-divergence the policy is kept close to the reference: https://arxiv.org/abs/2309.16240."""

    @abstractmethod
    def link(self, log_ratios: Tensor) -> Tensor:
        """(B,) f′(π / π_ref), up to a constant."""


class ReverseKL(Divergence):
    """KL(π ‖ π_ref), that of DPO's derivation."""

    def link(self, log_ratios: Tensor) -> Tensor:
        """(B,) log π / π_ref."""
        return reverse_kl_link(log_ratios)


class ForwardKL(Divergence):
    """KL(π_ref ‖ π), which covers all that the reference says."""

    def link(self, log_ratios: Tensor) -> Tensor:
        """(B,) −π_ref / π."""
        return forward_kl_link(log_ratios)


class JensenShannon(Divergence):
    """The Jensen-Shannon divergence: rewards are bounded above."""

    def link(self, log_ratios: Tensor) -> Tensor:
        """(B,) log 2π / (π + π_ref)."""
        return jensen_shannon_link(log_ratios)


class Alpha(Divergence):
    """The α-divergence, between reverse KL (α → 0) and forward KL (α = 1).

    Args:
        alpha: α, above 0 and at most 1.
    """

    def __init__(self, alpha: float = 0.5) -> None:
        require("alpha", 0 < alpha <= 1, "above 0 and at most 1", alpha)
        self.alpha = alpha

    def link(self, log_ratios: Tensor) -> Tensor:
        """(B,) (1 − (π / π_ref)^−α) / α."""
        return alpha_link(log_ratios, self.alpha)


# --- objectives -----------------------------------------------------------------------------------------------------


class PairObjective(ABC):
    """A loss of pairs, and the reward of a completion that is implied by it."""

    uses_reference = True

    @abstractmethod
    def score(self, completions: Likelihoods) -> Tensor:
        """(B,) implicit rewards: what is logged, and what orders a pair."""

    @abstractmethod
    def loss(self, chosen: Likelihoods, rejected: Likelihoods) -> Tensor:
        """(B,) losses of pairs."""


class DPO(PairObjective):
    """Direct preference optimisation.

    loss = −log σ(r_w − r_l),  r = β f′(π / π_ref),  of log-probs summed over the tokens

    Rafailov et al. 2023, equation 7, https://arxiv.org/abs/2305.18290; other divergences than the reverse KL: Wang et
    al. 2023, https://arxiv.org/abs/2309.16240.

    Args:
        beta: β, the price of leaving the reference: 0.01 to 0.5.
        divergence: ReverseKL, ForwardKL, JensenShannon or Alpha; None is ReverseKL, with which r = β log π / π_ref.
    """

    def __init__(self, beta: float = 0.1, divergence: Divergence | None = None) -> None:
        require("beta", beta > 0, "above 0", beta)
        self.beta, self.divergence = beta, divergence or ReverseKL()

    def score(self, completions: Likelihoods) -> Tensor:
        """(B,) β f′(π / π_ref)."""
        return self.beta * self.divergence.link(completions.log_ratios)

    def loss(self, chosen: Likelihoods, rejected: Likelihoods) -> Tensor:
        """(B,) negative log-likelihoods of the choice."""
        return bradley_terry_loss(self.score(chosen), self.score(rejected))


class _OfLogRatios(PairObjective):
    """Objectives of the difference of two log-ratios, with DPO's reward."""

    def __init__(self, beta: float = 0.1) -> None:
        require("beta", beta > 0, "above 0", beta)
        self.beta = beta

    def score(self, completions: Likelihoods) -> Tensor:
        """(B,) β log π / π_ref."""
        return self.beta * completions.log_ratios


class IPO(_OfLogRatios):
    """Identity preference optimisation: regression onto a fixed difference, which certain labels cannot push to ∞.

    loss = (u_w − u_l − 1 / (2β))²,  u = log π / π_ref,  of log-probs summed over the tokens, as in the paper; TRL
    divides them by the length, so its β is another

    Azar et al. 2023, equation 17, https://arxiv.org/abs/2310.12036.

    Args:
        beta: τ in the paper: 0.01 to 1.
    """

    def loss(self, chosen: Likelihoods, rejected: Likelihoods) -> Tensor:
        """(B,) squared errors."""
        return ipo_loss(chosen.log_ratios - rejected.log_ratios, self.beta)


class Hinge(_OfLogRatios):
    """The hinge loss of SLiC-HF with DPO's reward: pairs that are far enough apart teach nothing more.

    loss = max(0, 1 − β (u_w − u_l)),  u = log π / π_ref,  of log-probs summed over the tokens

    Zhao et al. 2023, https://arxiv.org/abs/2305.10425, without a reference; with one: Liu et al. 2023,
    https://arxiv.org/abs/2309.06657.

    Args:
        beta: β: 0.05 to 1.
    """

    def loss(self, chosen: Likelihoods, rejected: Likelihoods) -> Tensor:
        """(B,) what is missing to a margin of 1."""
        return hinge_preference_loss(chosen.log_ratios - rejected.log_ratios, self.beta)


class SimPO(PairObjective):
    """Simple preference optimisation: likelihood per token as the reward, a margin, no reference.

    loss = −log σ(r_w − r_l − γ),  r = β log π(y|x) / |y|,  a mean over the tokens; γ is in units of r, outside of β

    Meng et al. 2024, equation 6, https://arxiv.org/abs/2405.14734. Their code takes γ / β (0.5, say) in its stead.

    Args:
        beta: β, larger than DPO's since a mean is smaller than a sum: 2 to 10.
        gamma: γ, by how much the rewards shall differ: 0 to β, usually half of β.
    """

    uses_reference = False

    def __init__(self, beta: float = 2.0, gamma: float = 1.0) -> None:
        require("beta", beta > 0, "above 0", beta)
        require("gamma", gamma >= 0, "at least 0", gamma)
        self.beta, self.gamma = beta, gamma

    def score(self, completions: Likelihoods) -> Tensor:
        """(B,) β log π(y|x) / |y|."""
        return self.beta * completions.mean_logprobs

    def loss(self, chosen: Likelihoods, rejected: Likelihoods) -> Tensor:
        """(B,) negative log-likelihoods of the choice by a margin."""
        score = self.score(chosen)
        return bradley_terry_loss(score, self.score(rejected), score.new_full(score.shape, self.gamma))


class CPO(PairObjective):
    """Contrastive preference optimisation: DPO under a uniform reference, and the likelihood of the chosen.

    loss = −log σ(r_w − r_l) − nll_coef · log π(y_w|x) / |y_w|,  r = β log π(y|x), a sum over the tokens

    Xu et al. 2024, equation 5, https://arxiv.org/abs/2401.08417. The paper writes the likelihood as a sum, too; the
    authors' code takes its mean over the tokens, which is done here for each pair.

    Args:
        beta: β: 0.01 to 0.5.
        nll_coef: weight of the likelihood of the chosen completion, 1 in the paper; 0 leaves it out.
    """

    uses_reference = False

    def __init__(self, beta: float = 0.1, nll_coef: float = 1.0) -> None:
        require("beta", beta > 0, "above 0", beta)
        require("nll_coef", nll_coef >= 0, "at least 0", nll_coef)
        self.beta, self.nll_coef = beta, nll_coef

    def score(self, completions: Likelihoods) -> Tensor:
        """(B,) β log π(y|x)."""
        return self.beta * completions.logprobs

    def loss(self, chosen: Likelihoods, rejected: Likelihoods) -> Tensor:
        """(B,) negative log-likelihoods of the choice, and of the chosen."""
        return bradley_terry_loss(self.score(chosen), self.score(rejected)) - self.nll_coef * chosen.mean_logprobs


class ORPO(PairObjective):
    """Odds-ratio preference optimisation: fine-tuning on the chosen, with a term against the rejected.

    loss = −p_w + λ · −log σ(log odds(p_w) − log odds(p_l)),  p = log π(y|x) / |y|,  a mean over the tokens

    Hong et al. 2024, equation 6, https://arxiv.org/abs/2403.07691. It needs no SFT stage before it.

    Args:
        odds_coef: λ: 0.1 to 1.
    """

    uses_reference = False

    def __init__(self, odds_coef: float = 0.1) -> None:
        require("odds_coef", odds_coef > 0, "above 0", odds_coef)
        self.odds_coef = odds_coef

    def score(self, completions: Likelihoods) -> Tensor:
        """(B,) log-odds of the completions."""
        return log_odds(completions.mean_logprobs)

    def loss(self, chosen: Likelihoods, rejected: Likelihoods) -> Tensor:
        """(B,) negative log-likelihoods per token of the chosen, and the odds term."""
        odds = odds_ratio_loss(chosen.mean_logprobs, rejected.mean_logprobs)
        return self.odds_coef * odds - chosen.mean_logprobs
