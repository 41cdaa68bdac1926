"""Rewards of sampled responses, as one interface: functions, checkers, services, reward models, and weighted lists."""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..pretrained import PACKAGE_PREFIX
from ..rewards import HTTPReward
from .checks import require
from .reward_functions import FunctionReward
from .reward_models import EnsembleReward, ModelReward
from .reward_terms import Responses, RewardTerm, Scores
from .sharing import SharedBase

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks."""
FLOAT32_DIGITS = 1e-6
"""A standard deviation below this share of the mean is rounding, not reward."""


class WeightedRewards:
    """A weighted sum of rewards; a weight of 0 logs a reward without training on it.

    total = Σ_k w_k r_k,    or, normalised, Σ_k w_k (r_k − mean_k) / std_k

    Args:
        terms: the rewards.
        weights: one per reward; None is 1 for each.
        normalize: bring the rewards to one scale before they are weighted, by the mean and the standard deviation of
            each over all scores of the run so far. Rewards of tokens and steps are only divided, by the standard
            deviation of their sums: a shift would have to go to some token. A reward that never varied counts 0.
    """

    def __init__(
        self, terms: Sequence[RewardTerm], weights: Sequence[float] | None = None, normalize: bool = False
    ) -> None:
        weights = [1.0] * len(terms) if weights is None else weights
        if len(weights) != len(terms):
            raise ValueError(f"`reward_weights` must have one weight per reward: {len(terms)}, but got {len(weights)}.")
        self.terms = dict(zip(_different([term.name for term in terms]), terms, strict=True))
        self.weights = weights
        self.normalize = normalize
        self._moments: dict[str, list[float]] = {}

    def to(
        self, device: torch.device, mesh: DeviceMesh | None = None, base: SharedBase | None = None
    ) -> "WeightedRewards":
        """Move the reward models to a device, or spread them over a mesh; see `ModelReward`."""
        for term in self.terms.values():
            if isinstance(term, ModelReward | EnsembleReward):
                term.to(device, mesh, base)
        return self

    def __call__(self, given: Responses, reduce: Reduce | None = None) -> Scores:
        """Total, components and what was earned at tokens.

        Args:
            given: B responses.
            reduce: sums a tensor (float64, on the CPU) over all ranks, which must all be here. With it the scores
                count towards the running means of `normalize`; without it, in evaluations, those stay as they are.
        """
        # All are started before any is waited for: `async` functions run beside each other, and beside the models.
        started = [
            term.start(given) if isinstance(term, FunctionReward) else partial(term, given)
            for term in self.terms.values()
        ]
        found = {name: _checked(name, get(), given) for name, get in zip(self.terms, started, strict=True)}
        if self.normalize and reduce is not None:
            self._observe({name: scores.total for name, scores in found.items()}, reduce)
        total, per_token, components = torch.zeros(len(given.texts)), None, {}
        for weight, (name, scores) in zip(self.weights, found.items(), strict=True):
            components |= {name: scores.total} | {f"{name}/{key}": v for key, v in scores.components.items()}
            mean, scale = self._shift_and_scale(name)
            if scores.per_token is None:
                # In float64, where a mean far from 0 leaves the difference its digits.
                total = total + weight * (scale * (scores.total.double() - mean)).float()
                continue
            total = total + weight * scale * scores.total
            part = weight * scale * scores.per_token
            per_token = part if per_token is None else per_token + part
        return Scores(total, components, per_token)

    def _observe(self, totals: dict[str, Tensor], reduce: Reduce) -> None:
        """Merge a batch of all ranks into the running moments (Chan et al.): Σx² − n·mean² would lose digits."""
        values = torch.stack(list(totals.values())).double()  # (terms, B)
        counts = torch.full((len(values), 1), float(values.shape[1]), dtype=torch.float64)
        new, sums = reduce(torch.cat([counts, values.sum(1, keepdim=True)], dim=1)).unbind(1)
        means = sums / new
        squares = reduce((values - means[:, None]).square().sum(1))
        for name, n, mean, square in zip(totals, new.tolist(), means.tolist(), squares.tolist(), strict=True):
            count, old_mean, old_square = self._moments.get(name, [0.0, 0.0, 0.0])
            gap, whole = mean - old_mean, count + n
            self._moments[name] = [
                whole,
                old_mean + gap * n / whole,
                old_square + square + gap**2 * count * n / whole,
            ]

    def _shift_and_scale(self, name: str) -> tuple[float, float]:
        """Mean, and 1 / standard deviation; 0 and 1 if nothing is known, or nothing is to be normalised."""
        count, mean, squares = self._moments.get(name, [0.0, 0.0, 0.0])
        if not self.normalize or not count:
            return 0.0, 1.0
        std = (squares / count) ** 0.5
        return mean, 1 / std if std > FLOAT32_DIGITS * abs(mean) else 0.0

    def state_dict(self) -> dict[str, list[float]]:
        """Count, mean and sum of squared deviations of each reward so far; empty without `normalize`."""
        return {name: list(moments) for name, moments in self._moments.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on from a state; a reward that it does not name starts anew."""
        self._moments = {name: list(moments) for name, moments in state.items() if name in self.terms}


def _checked(name: str, earned: Tensor | Scores, given: Responses) -> Scores:
    """What a term gave, as Scores on the CPU, if all of it is finite."""
    scores = earned if isinstance(earned, Scores) else Scores(earned, {})
    per_token = scores.total[:, None] if scores.per_token is None else scores.per_token
    for values in (per_token, *(x[:, None] for x in (scores.total, *scores.components.values()))):
        if bad := (~values.isfinite()).nonzero().tolist():
            i, t = bad[0]
            where = f"token {t} of sample {i}" if values.shape[1] > 1 else f"sample {i}"
            raise ValueError(f"The reward `{name}` returned {values[i, t].item()} for {where}: {given.shown(i)}.")
    return Scores(
        scores.total.float().cpu(),
        {key: value.float().cpu() for key, value in scores.components.items()},
        None if scores.per_token is None else scores.per_token.float().cpu(),
    )


def reward_terms(spec: Any, dtype: str, batch_size: int, padding_free: bool = True) -> list[RewardTerm]:
    """The rewards that a flag names: functions are imported now, models are loaded when they are first needed.

    Args:
        spec: one of these, or a list of them:
            a reward model: a folder, a hub id, `package:NAME`, a `.ckpt` file or a module;
            a function or a callable object; the dotted path of a function, or of a class that needs no arguments;
            `{class_path: dotted path of a class, init_args: {...}}`;
            the URL of a service, see `HTTPReward`.
        dtype: of the weights of reward models.
        batch_size: most texts in one forward of a reward model.
        padding_free: of reward models, see `TextModule`.
    """
    if isinstance(spec, list | tuple):
        return [term for one in spec for term in reward_terms(one, dtype, batch_size, padding_free)]
    models = {"dtype": dtype, "batch_size": batch_size, "padding_free": padding_free}
    if isinstance(spec, dict):
        spec = _instance(spec, models)
    elif isinstance(spec, str) and spec.startswith(("http://", "https://")):
        spec = HTTPReward(spec)
    elif isinstance(spec, str) and not _names_a_model(spec):
        spec = _imported(spec)
    if isinstance(spec, type):
        spec = _made(spec, {})
    if isinstance(spec, ModelReward | EnsembleReward | FunctionReward):
        return [spec]
    if isinstance(spec, str | torch.nn.Module):
        return [ModelReward(spec, **models)]
    require("reward", callable(spec), "a reward model, a function, a callable object, a URL, or a list of these", spec)
    return [FunctionReward(spec)]


def _instance(spec: dict[str, Any], models: dict[str, Any]) -> Any:
    """Of `class_path` and `init_args`; reward models take the module's flags where `init_args` do not say otherwise."""
    expected = "`class_path` and `init_args` in a mapping"
    require("reward", "class_path" in spec and spec.keys() <= {"class_path", "init_args"}, expected, spec)
    found = _imported(spec["class_path"])
    require("reward", isinstance(found, type), f"a class at class_path={spec['class_path']}", found)
    arguments = spec.get("init_args") or {}
    return _made(found, models | arguments if issubclass(found, ModelReward | EnsembleReward) else arguments)


def _made(cls: type, arguments: dict[str, Any]) -> Any:
    path = f"{cls.__module__}.{cls.__qualname__}"
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`reward`: {path} cannot be made with {arguments}: {str(error).rstrip('.')}. "
            f"Its arguments are given as {{class_path: {path}, init_args: {{...}}}}."
        ) from error


def _names_a_model(spec: str) -> bool:
    if spec.endswith(".ckpt") and not Path(spec).is_file():
        raise ValueError(f"`reward`: there is no checkpoint `{spec}`.")
    return "/" in spec or spec.startswith(PACKAGE_PREFIX) or Path(spec).exists()


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`reward={path}` is neither the dotted path of a Python function or class that can be imported ({error}), "
            "nor the folder, hub id or .ckpt file of a reward model, nor a URL."
        ) from error


def _different(names: list[str]) -> list[str]:
    """The names, with a number after those that stand there already."""
    return [name if names.index(name) == i else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)]
