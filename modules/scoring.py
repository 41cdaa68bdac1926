"""Rewards of sampled responses, as one interface: a reward model, a Python function, or a weighted list of these."""

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..pretrained import PACKAGE_PREFIX, load_tokenizer
from .backbone import Scorer
from .sharding import num_chunks, shard, skeleton_unless_first


class Scores(NamedTuple):
    """Rewards of B responses."""

    total: Tensor
    """(B,) float32, the weighted sum of the components."""
    components: dict[str, Tensor]
    """Each reward by name, (B,) float32, unweighted."""


class RewardTerm(Protocol):
    """One reward. Prompts and responses are text; columns are the other columns of the prompt data, lists of B."""

    name: str

    def __call__(self, prompts: list[str], responses: list[str], columns: dict[str, list]) -> Tensor:
        """(B,) rewards."""


class FunctionReward:
    """A Python function `f(prompts, responses, **columns) -> list of B floats`.

    Args:
        function: the function, or its dotted path.

    Raises:
        ValueError: when it cannot be imported, raises, or returns NaN, infinity or the wrong number of values.
    """

    def __init__(self, function: str | Callable) -> None:
        self.function = _imported(function) if isinstance(function, str) else function
        self.name = getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, prompts: list[str], responses: list[str], columns: dict[str, list]) -> Tensor:
        """(B,) rewards."""
        try:
            values = [float(value) for value in self.function(prompts=prompts, responses=responses, **columns)]
        except Exception as error:
            raise ValueError(
                f"The reward function `{self.name}` failed on {len(prompts)} samples, the first of which was "
                f"{_shown(prompts[0], responses[0])}: {type(error).__name__}: {error}"
            ) from error
        if len(values) != len(responses):
            raise ValueError(
                f"The reward function `{self.name}` must return one float per response: got {len(values)} for "
                f"{len(responses)} responses."
            )
        for i, value in enumerate(values):
            if not math.isfinite(value):
                raise ValueError(
                    f"The reward function `{self.name}` returned {value} for sample {i}: "
                    f"{_shown(prompts[i], responses[i])}."
                )
        return torch.tensor(values, dtype=torch.float32)


class ModelReward:
    """A reward model read at the end of prompt + response + EOS, with its own tokenizer.

    The network is no submodule of the policy's module: it is in no optimizer and no checkpoint.

    Args:
        model: the folder that `RewardModule` exported, a hub id of a reward model, a `.ckpt` file of a
            `RewardModule`, or a `RewardModule`.
        dtype: of the backbone's weights.
        batch_size: most texts in one forward.
    """

    def __init__(self, model: object, dtype: str = "float32", batch_size: int = 32) -> None:
        self.name = "reward_model"
        self._spec, self._dtype, self._batch_size = model, dtype, batch_size
        self._scorer: Scorer | None = None
        self._mesh: DeviceMesh | None = None

    def _load(self) -> None:
        from .reward import RewardModule  # a reward module is built on this package's parts, not the other way round

        module = self._spec
        if isinstance(module, str) and module.endswith(".ckpt"):
            module = RewardModule.load_from_checkpoint(module, map_location="cpu", weights_only=True)
        if isinstance(module, RewardModule):
            module.configure_model()
            self._scorer, self._tokenizer = module.network, module.tokenizer
        else:
            self._scorer, self._tokenizer = Scorer.load(module, self._dtype), load_tokenizer(module)
        self._scorer.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, prompts: list[str], responses: list[str], columns: dict[str, list]) -> Tensor:
        """(B,) normalised scores."""
        if self._scorer is None:
            self._load()
        ids = [
            [*self._tokenizer(prompt + response)["input_ids"], self._tokenizer.eos_token_id]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # like lengths together: little padding
        scores = torch.empty(len(ids), dtype=torch.float32)
        for chunk in torch.tensor(order).tensor_split(num_chunks(len(ids), self._batch_size, self._mesh)):
            scores[chunk] = self._score([ids[i] for i in chunk.tolist()]).float().cpu()
        return scores

    def _score(self, ids: list[list[int]]) -> Tensor:
        device = self._scorer.head.weight.device
        length = max(map(len, ids))
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], device=device)
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids], device=device)
        return self._scorer(padded, mask)

    def to(self, device: torch.device, mesh: DeviceMesh | None = None) -> "ModelReward":
        """Load the model, if it is not yet, and move it; under FSDP2 shard it over the ranks of the mesh."""
        if self._scorer is None:
            self._mesh = mesh
            with skeleton_unless_first(mesh):
                self._load()
            shard(self._scorer, mesh)
        self._scorer.to(device)
        return self


class WeightedRewards:
    """A weighted sum of rewards; a weight of 0 logs a reward without training on it.

    Args:
        terms: the rewards.
        weights: one per reward; None is 1 for each.
    """

    def __init__(self, terms: Sequence[RewardTerm], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(terms) if weights is None else weights
        if len(weights) != len(terms):
            raise ValueError(f"`reward_weights` must have one weight per reward: {len(terms)}, but got {len(weights)}.")
        self.terms = dict(zip(_different([term.name for term in terms]), terms, strict=True))
        self.weights = weights

    def to(self, device: torch.device, mesh: DeviceMesh | None = None) -> "WeightedRewards":
        """Move the reward models to a device, or spread them over a mesh."""
        for term in self.terms.values():
            if isinstance(term, ModelReward):
                term.to(device, mesh)
        return self

    def __call__(self, prompts: list[str], responses: list[str], columns: dict[str, list]) -> Scores:
        """Total and components."""
        components = {name: term(prompts, responses, columns) for name, term in self.terms.items()}
        total = sum(w * c for w, c in zip(self.weights, components.values(), strict=True))
        return Scores(total, components)


def reward_terms(spec: object, dtype: str, batch_size: int) -> list[RewardTerm]:
    """The rewards that a flag names: functions are imported now, models are loaded when they are first needed."""
    if isinstance(spec, list | tuple):
        return [term for one in spec for term in reward_terms(one, dtype, batch_size)]
    if callable(spec) and not isinstance(spec, torch.nn.Module):
        return [FunctionReward(spec)]
    if isinstance(spec, str) and not _names_a_model(spec):
        return [FunctionReward(spec)]
    return [ModelReward(spec, dtype, batch_size)]


def _names_a_model(spec: str) -> bool:
    if spec.endswith(".ckpt") and not Path(spec).is_file():
        raise ValueError(f"`reward`: there is no checkpoint `{spec}`.")
    return "/" in spec or spec.startswith(PACKAGE_PREFIX) or Path(spec).exists()


def _imported(path: str) -> Callable:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`reward={path}` is neither the dotted path of a Python function that can be imported ({error}), nor the "
            "folder, hub id or .ckpt file of a reward model."
        ) from error


def _different(names: list[str]) -> list[str]:
    """The names, with a number after those that stand there already."""
    return [name if names.index(name) == i else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def _shown(prompt: str, response: str) -> str:
    return f"prompt {prompt[-80:]!r}, response {response[:80]!r}"
