"""What methods share that learn from given completions by their log-probabilities: DPO and its relatives, KTO."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..functional import token_logprobs
from .backbone import load_causal_lm
from .reading import logits_at, read
from .reference import FrozenReference
from .reference_cache import ReferenceCache, fill, open_cache
from .text_module import TextModule


class Completions(NamedTuple):
    """What a network says of B completions."""

    logprobs: Tensor
    """(B,) float32, log π(completion | prompt): the sum over its tokens, EOS included."""
    lengths: Tensor
    """(B,) number of these tokens."""


def completion_logprobs(network: nn.Module, batch: dict[str, Tensor]) -> Completions:
    """One forward pass; logits only where completions are.

    Args:
        network: a causal LM.
        batch: `input_ids`, `attention_mask` and `loss_mask` (True at completion tokens), all (B, L), right-padded.
    """
    where = targets(batch)
    return summed(read(network, batch["input_ids"], batch["attention_mask"], where).logprobs, where)


def targets(batch: dict[str, Tensor]) -> Tensor:
    """(B, L) bool, the completion tokens; a sequence's first token has nothing before it, and is none."""
    return pad(batch["loss_mask"][:, 1:], (1, 0))


def summed(per_token: Tensor, where: Tensor) -> Completions:
    """Sums over the completions of (N,) log-probabilities of their tokens, which are where (B, L) says."""
    rows = where.nonzero()[:, 0]
    return Completions(per_token.new_zeros(len(where)).index_add(0, rows, per_token), where.sum(1))


def completion_logits(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(N, V) logits before each of the batch's N completion tokens, row by row, of one forward pass."""
    before = pad(batch["loss_mask"][:, 1:], (0, 1))  # the position before a token predicts it
    return logits_at(network, batch["input_ids"], batch["attention_mask"], before)


def completions_of(logits: Tensor, batch: dict[str, Tensor]) -> Completions:
    """From the (N, V) logits of `completion_logits` to sums over the tokens of each completion."""
    where = targets(batch)
    return summed(token_logprobs(logits, batch["input_ids"][where]), where)


class CompletionModule(TextModule):
    """Base of the methods that compare the policy's log-probabilities of completions with those of a reference.

    Args:
        model: the starting policy, usually the SFT model's folder.
        reference: the reference, given like `model`; None is the starting policy itself: with LoRA the adapter switched
            off, else a frozen copy.
        reference_cache: a folder: `fit` then first computes the reference's log-probabilities of all training and
            validation completions, or finds them there from an earlier run, and gives the reference's memory back
            before it trains. None asks the reference at every step.
        **kwargs: see `TextModule`.
    """

    exported = "policy"
    uses_reference = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        reference: str | None = None,
        reference_cache: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.policy: nn.Module | None = None
        self.reference: FrozenReference | None = None
        self._cache: ReferenceCache | None = None

    def build(self) -> list[nn.Module]:
        """Load the policy and, if the method uses one, its frozen reference."""
        networks, hparams = super().build(), self.hparams
        if not self.uses_reference:
            return networks
        other = hparams.reference and load_causal_lm(hparams.reference, self.backbone_dtype, hparams.trust_remote_code)
        self.reference = FrozenReference(self.policy, other)
        return networks if self.reference.copy is None else [*networks, self.reference.copy]

    def on_fit_start(self) -> None:
        """With `reference_cache`: look up or compute what the reference says, and let go of it.

        Here a resumed run's reference is still that of its start, and no gradient, no optimizer state and no activation
        takes memory yet.
        """
        if self.hparams.reference_cache is None:
            return
        if self._cache is None:
            self._cache = open_cache(self.hparams.reference_cache, self)
        fit_loop = self.trainer.fit_loop
        fit_loop.setup_data()  # Lightning does so itself a little later, and then keeps these loaders
        if self.trainer.enable_validation:
            fit_loop.epoch_loop.val_loop.setup_data()
        with self.trainer.precision_plugin.forward_context():
            for loader in [*_loaders(self.trainer.train_dataloader), *_loaders(self.trainer.val_dataloaders)]:
                fill(self._cache, loader, self)
        self.reference = None

    @torch.no_grad()
    def reference_logprobs(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) log π_ref of the completions; 0 for methods without a reference."""
        if not self.uses_reference:
            return torch.zeros(len(batch["input_ids"]), device=self.device)
        if self.reference is None:
            return self._cache.lookup(batch)
        with self.reference() as network:
            return completion_logprobs(network, batch).logprobs


def _loaders(given: Any) -> list[Any]:
    """One loader, several, or none, as a list."""
    return list(given) if isinstance(given, list | tuple) else [given] if given is not None else []
