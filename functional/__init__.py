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
from .diversity import distinct_n, unique_share
from .kl import adaptive_kl_coef, kl_k1, kl_k2, kl_k3
from .logprobs import entropy, forbid_tokens, token_logprobs
from .losses import (
    bradley_terry_loss,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    is_clipped,
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
from .ratings import mean_rating, median_rating, preference_matrix, trimmed_mean_rating
from .shaping import kl_shaped_rewards, penalize_missing_eos

__all__ = [
    "AdvantageEstimate",
    "adaptive_kl_coef",
    "bradley_terry_loss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "distinct_n",
    "entropy",
    "explained_variance",
    "forbid_tokens",
    "gae",
    "is_clipped",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_shaped_rewards",
    "last_index",
    "masked_mean",
    "masked_mean_and_var",
    "masked_sum",
    "mean_rating",
    "median_rating",
    "penalize_missing_eos",
    "position_ids",
    "preference_matrix",
    "response_mask",
    "scale_to_unit_variance",
    "soft_bradley_terry_loss",
    "token_logprobs",
    "trimmed_mean_rating",
    "unique_share",
    "whiten",
]
