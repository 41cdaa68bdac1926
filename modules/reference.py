"""The frozen reference that a policy is held against."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..strategies import local, placed_like
from .checks import require
from .sharding import whole_state

ADAPTER = "reference"  # peft's name for the adapter of a refreshed reference


class FrozenReference:
    """The policy as it is now: the adapter switched off, or a frozen copy. Or another network, if one is given.

    It is no nn.Module, so the copy is no part of a module that holds it: it is in no optimizer, no checkpoint and no
    DDP bucket.

        with reference() as network:
            network(...)

    `refresh` moves it to where the policy is by then. A copy is written over. A policy with LoRA gets a second, frozen
    adapter, which is switched on where the first is switched off; a separate network that was the reference is let go.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, other: PreTrainedModel | None = None) -> None:
        self._model = model
        frozen = other if other is not None or isinstance(model, PeftModel) else _twin(model)
        self.copy = None if frozen is None else frozen.eval().requires_grad_(False)
        self.refreshes = 0
        """How often it was refreshed."""

    @contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        """The reference network, on the policy's device."""
        if self.copy is not None:
            yield self.copy.to(next(self._model.parameters()).device)
        elif self.refreshes:
            with self._refreshed_adapter():
                yield self._model
        else:
            with self._model.disable_adapter():
                yield self._model

    @contextmanager
    def _refreshed_adapter(self) -> Iterator[None]:
        trained = self._model.active_adapter
        self._model.set_adapter(ADAPTER)
        try:
            yield
        finally:
            self._model.set_adapter(trained)  # which also says again which of the two is trained

    def check(self, weight: float) -> None:
        """ValueError if the reference cannot be refreshed with this weight."""
        require("weight", 0 < weight <= 1, "above 0 and at most 1", weight)
        if isinstance(self._model, PeftModel):
            expected = "1 with LoRA, as the mean of two adapters is no adapter of their rank: train with `lora_r` 0"
            require("weight", weight == 1, expected, weight)
            return
        shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (self.copy, self._model)]
        if shapes[0] != shapes[1]:
            raise ValueError("`reference` must have the policy's architecture to be refreshed: its tensors differ.")

    @torch.no_grad()
    def refresh(self, weight: float = 1.0) -> None:
        """(1 − weight) · reference + weight · policy, tensor by tensor and in place; of sharded ones each rank its own.

        All ranks must call it. The mean is taken in float32 and kept in the reference's dtype: in bfloat16 a change of
        less than 1/512 of a value is lost, and with a small weight most are.
        """
        self.check(weight)
        if isinstance(self._model, PeftModel):
            trained = self._model.active_adapter
            self._add_adapter()
            for name, tensor in self._tensors().items():
                theirs = self._model.get_parameter(_renamed(name, ADAPTER, trained))
                tensor.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)
        else:
            with self() as network:
                for mine, theirs in zip(network.parameters(), self._model.parameters(), strict=True):
                    mean = torch.lerp(local(mine).float(), local(theirs).float(), weight)
                    local(mine).copy_(mean)
        self.refreshes += 1

    def state(self) -> dict[str, Tensor]:
        """Whole tensors of a refreshed reference, on the CPU of the first rank; before a refresh there are none.

        All ranks must call it.
        """
        if not self.refreshes:
            return {}
        if self.copy is not None:
            return whole_state(self.copy)
        return {name: tensor.cpu() for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], refreshes: int) -> None:
        """Become what `state` gave after so many refreshes. All ranks must call it, with whole tensors."""
        if isinstance(self._model, PeftModel) and refreshes:
            self._add_adapter()
        self.refreshes = refreshes
        if not refreshes:
            return
        tensors = self._tensors()
        if state.keys() != tensors.keys():
            raise ValueError(
                f"The checkpoint's refreshed reference has {len(state)} tensors and this one {len(tensors)}, or they "
                "have other names: it is that of another `model`, or of another `lora_r`."
            )
        for name, tensor in tensors.items():
            local(tensor).copy_(local(placed_like(state[name], tensor)))

    def _tensors(self) -> dict[str, Tensor]:
        """What a refresh writes to, by name."""
        if self.copy is not None:
            return self.copy.state_dict()
        named = self._model.named_parameters()
        return {name: p.detach() for name, p in named if name != _renamed(name, ADAPTER, "")}

    def _add_adapter(self) -> None:
        """A second adapter beside the trained one, in place of a separate reference."""
        self.copy = None
        if ADAPTER in self._model.peft_config:
            return
        config = copy.deepcopy(self._model.peft_config[self._model.active_adapter])
        with torch.random.fork_rng():  # peft draws values, which are then written over
            self._model.add_adapter(ADAPTER, config)


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy, which takes the weights as they are, in their file maybe; the model, to be trained, gets new ones."""
    twin = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        mine.data, theirs.data = theirs.data, mine.data
    return twin


def _renamed(name: str, adapter: str, other: str) -> str:
    """A LoRA parameter's name with another adapter in it; any other parameter's as it is."""
    parts = name.split(".")
    return ".".join(other if part == adapter else part for part in parts) if "lora_" in name else name
