"""The frozen reference that a policy is held against."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


class FrozenReference:
    """The policy as it is now: the adapter switched off, or a frozen copy. Or another network, if one is given.

    It is no nn.Module, so the copy is no part of a module that holds it: it is in no optimizer, no checkpoint and no
    DDP bucket.

        with reference() as network:
            network(...)
    """

    def __init__(self, model: PreTrainedModel | PeftModel, other: PreTrainedModel | None = None) -> None:
        self._model = model
        frozen = other if other is not None or isinstance(model, PeftModel) else copy.deepcopy(model)
        self.copy = None if frozen is None else frozen.eval().requires_grad_(False)

    @contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        """The reference network, on the policy's device."""
        if self.copy is not None:
            yield self.copy.to(next(self._model.parameters()).device)
            return
        with self._model.disable_adapter():
            yield self._model
