"""Alarms for the ways in which RLHF goes wrong quietly. Each watches logged figures, once an iteration.

Thresholds differ between tasks and models. Where no source is named, a default is this project's own choice: far enough
from healthy runs to be quiet there.
"""

import math
from statistics import fmean, median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from .alarm import Alarm, MetricAlarm, require

_RECENT = 5  # iterations whose median is the usual KL


class KLAlarm(MetricAlarm):
    """The policy leaves the reference: `rollout/kl` is high, jumps, or is below what a KL can be.

    The default threshold is this project's: in Gao et al. 2022 (https://arxiv.org/abs/2210.10760) the true score falls
    again from some tens of nats on, the earlier the smaller the reward model; in Stiennon et al. 2020
    (https://arxiv.org/abs/2009.01325) human preference did, too. Long responses with a rule as reward can bear more.

    Args:
        threshold: nats per sequence. Usual KLs in RLHF: 1 to 30.
        jump: so many times the median of the last 5 iterations is bad, too, once KL is above a fifth of `threshold`
            (from 0 every KL is a jump); None does not look at jumps.
        lowest: a KL below this is bad. Only its estimate can be negative, by chance a little; more means that the
            log-probabilities are not those of what was sampled. TRL's older PPOTrainer warns there, too.
        **kwargs: see `Alarm`.
    """

    metric = "rollout/kl"
    meaning = "What the reward says about texts so far from those it was made for is not to be trusted."
    remedy = "Read samples.csv, then raise `kl_coef` or lower `learning_rate`."

    def __init__(self, threshold: float = 50.0, jump: float | None = 4.0, lowest: float = -1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require("threshold", threshold > 0, "above 0", threshold)
        require("jump", jump is None or jump > 1, "above 1 or None", jump)
        require("lowest", lowest < 0, "below 0", lowest)
        self.threshold, self.jump, self.lowest = threshold, jump, lowest

    def judge(self, value: float) -> str | None:
        """High, a jump, or impossible."""
        recent = self.memory.get("recent", [])
        self.memory["recent"] = [*recent, value][-_RECENT:]
        usual = median(recent) if len(recent) == _RECENT else math.inf
        if value > self.threshold:
            return f"{self.metric} is {value:.3g} nats, above {self.threshold:g}."
        if value < self.lowest:
            return f"{self.metric} is {value:.3g} nats, which no KL can be (`lowest` is {self.lowest:g})."
        if self.jump is not None and value > self.threshold / 5 and value > self.jump * usual:
            return f"{self.metric} is {value:.3g} nats, more than {self.jump:g} times the recent {usual:.3g}."
        return None


class OveroptimizationAlarm(Alarm):
    """The reward in training rises while a score that is not trained on falls (Goodhart's law).

    Looks at the last `window` evaluations. Both trends are least-squares slopes, in units of their standard errors, so
    that noise is no trend. Gao et al. 2022 (https://arxiv.org/abs/2210.10760) show the gold score's rise and fall.

    Args:
        gold: the logged figure that should not fall: the reward on held-out prompts, or better, one that the policy is
            not trained on, as `val/reward/<name>` of a reward with weight 0.
        reward: the logged figure that training raises.
        window: evaluations to look at; with validation every n iterations, each is n iterations.
        threshold: by so many standard errors the slope of `reward` must be above 0, and that of `gold` below. At 3 with
            8 evaluations, a gold score without a trend gives a false alarm in 1.2% of the windows (Student's t).
        **kwargs: see `Alarm`.
    """

    meaning = "The policy finds what the reward overrates, and does not become better by it."
    remedy = "Go back to the checkpoint with the best gold score, and raise `kl_coef` or mend the reward."

    def __init__(
        self,
        gold: str = "val/reward",
        reward: str = "rollout/reward",
        window: int = 8,
        threshold: float = 3.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require("gold", gold != reward, "another figure than `reward`", gold)
        require("window", window >= 4, "at least 4, to tell a trend from noise", window)
        require("threshold", threshold >= 0, "at least 0", threshold)
        self.gold, self.reward, self.window, self.threshold = gold, reward, window, threshold
        self._validated = False

    @property
    def state_key(self) -> str:
        """One of these for each pair of figures."""
        return self._generate_state_key(gold=self.gold, reward=self.reward)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = not trainer.sanity_checking

    # Here and not where the validation ends: the iteration's own figures are there only now.
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        validated, self._validated = self._validated, False
        if self.action == "off" or not validated:
            return
        logged = trainer.callback_metrics
        if self.reward in logged and self.gold in logged:
            self.check(trainer, self.judge(float(logged[self.reward]), float(logged[self.gold])))
        elif self.reward in logged and not self.memory.get("told"):
            self.memory["told"] = True
            there = ", ".join(sorted(name for name in logged if name.startswith("val/")))
            rank_zero_warn(f"OveroptimizationAlarm has nothing to watch: `gold` {self.gold} is none of {there}.")

    def judge(self, reward: float, gold: float) -> str | None:
        """Whether the one rises while the other falls."""
        pairs = self.memory["pairs"] = [*self.memory.get("pairs", []), [reward, gold]][-self.window :]
        if len(pairs) < self.window:
            return None
        rewards, golds = ([pair[i] for pair in pairs] for i in (0, 1))
        if not (trend(rewards) > self.threshold and trend(golds) < -self.threshold):
            return None
        half = self.window // 2
        moves = [f"{fmean(values[:half]):.3g} to {fmean(values[-half:]):.3g}" for values in (rewards, golds)]
        return (
            f"over {self.window} evaluations {self.reward} rose from {moves[0]} while {self.gold} fell from "
            f"{moves[1]} (each by more than {self.threshold:g} standard errors)."
        )


class LengthAlarm(MetricAlarm):
    """Responses become much longer or shorter than they were in the first iteration.

    Much of what reward models like is length (Singhal et al. 2023, https://arxiv.org/abs/2310.03716). The factor is
    this project's choice.

    Args:
        factor: lengths from start / factor to start · factor are healthy. Where longer thinking is wanted: 5 or more.
        **kwargs: see `Alarm`.
    """

    metric = "rollout/response_length"
    meaning = "Length is the first thing that a policy finds in a reward; such a gain is often nothing else."
    remedy = "Look at rollout/reward_length_correlation, then penalise length or missing EOS, or mend the reward."

    def __init__(self, factor: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require("factor", factor > 1, "above 1", factor)
        self.factor = factor

    def judge(self, value: float) -> str | None:
        """Too long or too short, by the first length."""
        start = self.memory.setdefault("start", value)
        if start / self.factor <= value <= start * self.factor:
            return None
        return f"{self.metric} is {value:.3g} tokens, from {start:.3g} at the start: a factor above {self.factor:g}."


class EntropyAlarm(MetricAlarm):
    """The policy becomes certain of every token.

    Entropy falls in most runs, and reward is bought with it (Cui et al. 2025, https://arxiv.org/abs/2505.22617); what
    is used up early cannot be learned from later. Both limits are this project's choice.

    Args:
        share: of the entropy in the first iteration, below which it is bad; 0 is off.
        floor: nats per token, below which it is bad whatever the start was; 0 is off.
        **kwargs: see `Alarm`.
    """

    metric = "rollout/entropy"
    meaning = "The policy gives nearly the same response again and again, and cannot find better ones."
    remedy = "Lower `learning_rate` or `num_passes`, raise `kl_coef`, or give an `entropy_coef`."

    def __init__(self, share: float = 0.2, floor: float = 0.02, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require("share", 0 <= share < 1, "from 0 to below 1", share)
        require("floor", floor >= 0, "at least 0", floor)
        self.share, self.floor = share, floor

    def judge(self, value: float) -> str | None:
        """Below a share of the first entropy, or the floor."""
        start = self.memory.setdefault("start", value)
        if value < self.floor:
            return f"{self.metric} is {value:.3g} nats per token, below {self.floor:g}."
        if value < self.share * start:
            return f"{self.metric} is {value:.3g} nats per token, below {self.share:g} of the {start:.3g} at the start."
        return None


class EOSAlarm(MetricAlarm):
    """Responses no longer end by themselves, but are cut off at `max_new_tokens`.

    Args:
        share: of the rate in the first iteration, below which it is bad; 0 is off.
        threshold: a rate below which it is bad whatever the start was; 0 is off, for there are tasks in which nothing
            has to end.
        patience: iterations in a row; rates of few responses jump.
        **kwargs: see `Alarm`.
    """

    metric = "rollout/eos_rate"
    meaning = "What the reward says of a response that was cut off says little, and the policy forgets how to end."
    remedy = "Give a `missing_eos_penalty`, or more `max_new_tokens`."

    def __init__(self, share: float = 0.5, threshold: float = 0.0, patience: int = 3, **kwargs: Any) -> None:
        super().__init__(patience=patience, **kwargs)
        require("share", 0 <= share < 1, "from 0 to below 1", share)
        require("threshold", 0 <= threshold <= 1, "between 0 and 1", threshold)
        self.share, self.threshold = share, threshold

    def judge(self, value: float) -> str | None:
        """Below a share of the first rate, or the threshold."""
        start = self.memory.setdefault("start", value)
        if value < self.threshold:
            return f"{self.metric} is {value:.2g}, below {self.threshold:g}."
        if value < self.share * start:
            return f"{self.metric} is {value:.2g}, below {self.share:g} of the {start:.2g} at the start."
        return None


class CriticAlarm(MetricAlarm):
    """PPO's value model predicts the returns no better than their mean would.

    Args:
        threshold: `value/explained_variance` below which it is bad. A critic that says the same of every token has 0,
            one that is wrong is below it, a perfect one has 1; the default is just above 0.
        patience: iterations in a row; a new critic needs some to learn.
        **kwargs: see `Alarm`.
    """

    metric = "value/explained_variance"
    meaning = "The critic is dead: its baseline adds noise to the advantages in place of removing it."
    remedy = "Raise `value_learning_rate` or `num_passes`, start it from the reward model (`value_model`), or use GRPO."

    def __init__(self, threshold: float = 0.05, patience: int = 5, **kwargs: Any) -> None:
        super().__init__(patience=patience, **kwargs)
        require("threshold", threshold <= 1, "at most 1", threshold)
        self.threshold = threshold

    def judge(self, value: float) -> str | None:
        """Below the threshold."""
        below = value < self.threshold
        last = f", and was so for {self.patience} iterations" if self.patience > 1 else ""
        return f"{self.metric} is {value:.3g}, below {self.threshold:g}{last}." if below else None


class SpreadAlarm(MetricAlarm):
    """In most groups all responses have the same reward, which leaves their advantages at 0.

    Yu et al. 2025 (DAPO, https://arxiv.org/abs/2503.14476) show how the share of such groups grows in training.

    Args:
        threshold: `rollout/groups_with_spread` below which it is bad. This project's choice.
        patience: iterations in a row; shares of few groups jump.
        **kwargs: see `Alarm`.
    """

    metric = "rollout/groups_with_spread"
    meaning = "Groups with equal rewards teach nothing: the prompts are too easy or too hard, or the reward is flat."
    remedy = "Look at rollout/reward, then take other prompts, a larger `group_size`, or more `max_sampling_rounds`."

    def __init__(self, threshold: float = 0.2, patience: int = 3, **kwargs: Any) -> None:
        super().__init__(patience=patience, **kwargs)
        require("threshold", 0 < threshold <= 1, "above 0, at most 1", threshold)
        self.threshold = threshold

    def judge(self, value: float) -> str | None:
        """Below the threshold."""
        below = value < self.threshold
        return f"{self.metric} is {value:.2g}, below {self.threshold:g}." if below else None


class RatioAlarm(MetricAlarm):
    """Before an iteration's first optimizer step, the policy is not the one that sampled.

    There π/π_old is 1 in theory. What is left is rounding: the same sequences in other batches.

    Args:
        threshold: largest |log ratio| that is healthy; None is 0.001 if all is computed in float32, else 0.5: the
            first digits of a log-probability are all that 16 bits hold.
        **kwargs: see `Alarm`.
    """

    metric = "policy/first_ratio_error"
    meaning = "Log-probabilities in rollout and update differ: by mode, mask, temperature or weights."
    remedy = "Look for dropout, other padding or an own `logprobs`; try it in float32, where the error must vanish."

    def __init__(self, threshold: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require("threshold", threshold is None or threshold > 0, "above 0 or None", threshold)
        self.threshold = threshold
        self._limit = threshold

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._limit = self.threshold
        if self._limit is None:
            self._limit = 1e-3 if is_exact(trainer, pl_module) else 0.5

    def judge(self, value: float) -> str | None:
        """Above the threshold."""
        above = value > self._limit
        return f"{self.metric} is {value:.3g}, above {self._limit:g}." if above else None


def is_exact(trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
    """Whether the policy computes in float32 throughout: no half precision, no 4-bit weights, no TF32."""
    whole = pl_module.hparams.get("dtype", "float32") == "float32" and not pl_module.hparams.get("load_in_4bit")
    precise = str(trainer.precision).startswith(("32", "64"))
    return whole and precise and torch.get_float32_matmul_precision() == "highest"


def trend(values: list[float]) -> float:
    """The slope of a least-squares line, in units of its standard error; ±∞ of points on a line, 0 of equal values."""
    if min(values) == max(values):
        return 0.0
    count, mean = len(values), fmean(values)
    places = [i - (count - 1) / 2 for i in range(count)]
    squares = sum(x * x for x in places)
    slope = sum(x * (y - mean) for x, y in zip(places, values, strict=True)) / squares
    residual = sum((y - mean - slope * x) ** 2 for x, y in zip(places, values, strict=True))
    error = math.sqrt(residual / (count - 2) / squares)
    return slope / error if error else math.copysign(math.inf, slope)
