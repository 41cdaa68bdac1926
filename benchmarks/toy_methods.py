"""Every method on the language of `enumerable_toy.py`: its settings, and the end that theory names for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from enumerable_toy import LENGTH, Toy, responses, train
from limits import best_of_n, ipo, stationary
from torch import Tensor

from lightning_rlhf.modules import (
    GRPOModule,
    OnlineDPOModule,
    PPOModule,
    PreferenceModule,
    RFTModule,
    TextModule,
)
from lightning_rlhf.modules.compositions import (
    FixedLengthMean,
    GroupCentered,
    LeaveOneOut,
    SequenceRatio,
    TokenMean,
    WhitenedGroupScores,
    WhitenedReturns,
)
from lightning_rlhf.modules.objectives import DPO, IPO

BETA = 0.5


class Method(NamedTuple):
    """A method, what it is run with, and where it must end."""

    module: type[TextModule]
    options: dict[str, Any]
    end: Callable[[Toy], Tensor] = Toy.optimum
    iterations: int = 200

    def run(self, toy: Toy, seed: int, callbacks: list | None = None, iterations: int | None = None) -> Tensor:
        """log π where it ends."""
        return train(toy, seed, iterations or self.iterations, callbacks, self.module, **self.options)


def _stationary(normalized: bool, per_response: bool) -> Callable[[Toy], Tensor]:
    return lambda toy: stationary(
        responses(), toy.reference, toy.table, toy.beta, normalized=normalized, per_response=per_response
    )


IN_REWARD = dict(kl_coef=BETA, kl_in="reward", kl_estimator="k1", aggregation=TokenMean())
# Theory speaks of expectations: large groups make the group's mean and deviation those of the policy, and many samples
# calm k3, whose ratio is large where the policy seldom goes.
LARGE = dict(
    group_size=512, kl_coef=BETA, rollout_batch_size=2048, minibatch_size=512, num_passes=2, learning_rate=3e-3
)
METHODS = {
    "PPO": Method(PPOModule, dict(kl_coef=BETA, vf_coef=0.5, clip_range_value=None)),
    "RLOO": Method(GRPOModule, IN_REWARD | dict(group_size=4, advantage=LeaveOneOut())),
    "REINFORCE++": Method(
        GRPOModule, LARGE | IN_REWARD | dict(group_size=1, advantage=WhitenedReturns()), iterations=250
    ),
    "REINFORCE++-baseline": Method(GRPOModule, IN_REWARD | dict(group_size=4, advantage=WhitenedGroupScores())),
    "GRPO": Method(GRPOModule, LARGE, _stationary(normalized=True, per_response=True), 250),
    "Dr. GRPO": Method(
        GRPOModule,
        LARGE | dict(advantage=GroupCentered(), aggregation=FixedLengthMean(LENGTH)),
        _stationary(normalized=False, per_response=False),
        250,
    ),
    "DAPO": Method(
        GRPOModule, LARGE | dict(aggregation=TokenMean()), _stationary(normalized=True, per_response=False), 250
    ),
    "GSPO": Method(
        GRPOModule,
        LARGE | dict(objective=SequenceRatio(0.2, 0.2)),
        _stationary(normalized=True, per_response=True),
        250,
    ),
    "RFT (best of 4)": Method(
        RFTModule,
        dict(
            group_size=4,
            from_reference=True,
            rollout_batch_size=4096,
            minibatch_size=256,
            num_passes=1,
            learning_rate=4e-3,
        ),
        lambda toy: best_of_n(toy.reference, toy.table, 4),
        300,
    ),
    "online DPO": Method(OnlineDPOModule, dict(objective=DPO(BETA), label_temperature=1.0)),
    "DPO": Method(PreferenceModule, dict(objective=DPO(BETA)), iterations=600),
    "IPO": Method(
        PreferenceModule, dict(objective=IPO(BETA)), lambda toy: ipo(toy.reference, toy.table, toy.beta), iterations=600
    ),
}
