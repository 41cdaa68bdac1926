"""What methods share that learn from given completions by their log-probabilities: DPO and its relatives, KTO."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..functional import token_logprobs
from .backbone import load_causal_lm, logits_at
from .reference import FrozenReference
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
    mask = batch["loss_mask"][:, 1:]
    before = pad(mask, (0, 1))  # the position before a token predicts it
    logits = logits_at(network, batch["input_ids"], batch["attention_mask"], before)
    per_token = token_logprobs(logits, batch["input_ids"][:, 1:][mask])  # (tokens that count,)
    rows = mask.nonzero()[:, 0]
    return Completions(per_token.new_zeros(len(mask)).index_add(0, rows, per_token), mask.sum(1))


class CompletionModule(TextModule):
    """Base of the methods that compare the policy's log-probabilities of completions with those of a reference.

    Args:
        model: the starting policy, usually the SFT model's folder.
        reference: the reference, given like `model`; None is the starting policy itself: with LoRA the adapter switched
            off, else a frozen copy.
        **kwargs: see `TextModule`.
    """

    exported = "policy"
    uses_reference = True

    def __init__(self, model: str | PreTrainedModel, *, reference: str | None = None, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.policy: nn.Module | None = None
        self.reference: FrozenReference | None = None

    def build(self) -> list[nn.Module]:
        """Load the policy and, if the method uses one, its frozen reference."""
        networks, hparams = super().build(), self.hparams
        if not self.uses_reference:
            return networks
        other = hparams.reference and load_causal_lm(hparams.reference, self.backbone_dtype, hparams.trust_remote_code)
        self.reference = FrozenReference(self.policy, other)
        return networks if self.reference.copy is None else [*networks, self.reference.copy]

    @torch.no_grad()
    def reference_logprobs(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) log π_ref of the completions; 0 for methods without a reference."""
        if not self.uses_reference:
            return torch.zeros(len(batch["input_ids"]), device=self.device)
        with self.reference() as network:
            return completion_logprobs(network, batch).logprobs
