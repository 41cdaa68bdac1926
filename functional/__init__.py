"""The mathematics of RLHF as pure functions: tensors in, tensors out. No model, no state, no logging.

Notation, used in every shape and equation of this project:

======  ==================================================
`B`     sequences (texts) in a batch
`P`     prompt tokens, left-padded
`T`     response tokens, right-padded
`L`     `P + T`, a whole sequence
`V`     vocabulary
`G`     responses sampled for one prompt
`N`     raters of one text
======  ==================================================

Time. `logprobs[:, t]` is log π(token t | all before it); `values[:, t]` is the value before token t; `rewards[:, t]`
arrives after token t; the value after the end is 0. One mask is therefore right for all three.

Masks. `mask` is bool and True means "counts": from the first response token to the EOS, inclusive. What lies under
the mask may be anything, NaN too.

Numbers. Half precision and integers become float32 on the way in; float32 and float64 stay what they are. Losses and
KLs are per token or per pair; `masked_mean` reduces them. No function writes into its arguments.
"""

from .advantages import AdvantageEstimate, gae
from .aggregation import Parts, fixed_length_mean, sequence_mean, token_mean
from .diversity import distinct_n, unique_share
from .groups import group_centered, group_normalized, grouped, has_spread, leave_one_out, returns_to_go
from .kl import adaptive_kl_coef, exact_kl, kl_k1, kl_k2, kl_k3
from .kto import kto_loss, kto_reference_point
from .linear_logprobs import SampledFrom, TokenLikelihoods, linear_logprobs
from .logprobs import entropy, token_logprobs
from .losses import (
    bradley_terry_loss,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    is_clipped,
    sequence_logprobs,
    soft_bradley_terry_loss,
)
from .masking import (
    last_index,
    masked_mean,
    masked_mean_and_var,
    masked_sum,
    position_ids,
    response_mask,
    scale_to_unit_variance,
    whiten,
)
from .preferences import (
    alpha_link,
    forward_kl_link,
    hinge_preference_loss,
    ipo_loss,
    jensen_shannon_link,
    log_odds,
    odds_ratio_loss,
    reverse_kl_link,
    smoothed_preference,
    soft_preference_loss,
    unbiased_preference,
)
from .ratings import mean_rating, median_rating, preference_matrix, trimmed_mean_rating
from .reward_modelling import (
    free_thresholds,
    ordered_thresholds,
    ordinal_logprobs,
    ordinal_loss,
    plackett_luce_loss,
    rating_shares,
)
from .sampling import invert_cdf
from .shaping import kl_shaped_rewards, penalize_missing_eos, soft_overlong_penalty
from .statistics import bootstrap_interval, correlation, wins

__all__ = [
    "AdvantageEstimate",
    "Parts",
    "SampledFrom",
    "TokenLikelihoods",
    "adaptive_kl_coef",
    "alpha_link",
    "bootstrap_interval",
    "bradley_terry_loss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "correlation",
    "distinct_n",
    "entropy",
    "exact_kl",
    "explained_variance",
    "fixed_length_mean",
    "forward_kl_link",
    "free_thresholds",
    "gae",
    "group_centered",
    "group_normalized",
    "grouped",
    "has_spread",
    "hinge_preference_loss",
    "invert_cdf",
    "ipo_loss",
    "is_clipped",
    "jensen_shannon_link",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_shaped_rewards",
    "kto_loss",
    "kto_reference_point",
    "last_index",
    "leave_one_out",
    "linear_logprobs",
    "log_odds",
    "masked_mean",
    "masked_mean_and_var",
    "masked_sum",
    "mean_rating",
    "median_rating",
    "odds_ratio_loss",
    "ordered_thresholds",
    "ordinal_logprobs",
    "ordinal_loss",
    "penalize_missing_eos",
    "plackett_luce_loss",
    "position_ids",
    "preference_matrix",
    "rating_shares",
    "response_mask",
    "returns_to_go",
    "reverse_kl_link",
    "scale_to_unit_variance",
    "sequence_logprobs",
    "sequence_mean",
    "smoothed_preference",
    "soft_bradley_terry_loss",
    "soft_overlong_penalty",
    "soft_preference_loss",
    "token_logprobs",
    "token_mean",
    "trimmed_mean_rating",
    "unbiased_preference",
    "unique_share",
    "whiten",
    "wins",
]
