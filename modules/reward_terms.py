"""What every kind of reward is given, and what it gives back."""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Responses:
    """B sampled responses."""

    prompts: list[str]
    texts: list[str]
    """The responses as text, without the EOS."""
    columns: dict[str, list] = field(default_factory=dict)
    """The other columns of the prompt data, lists of B."""
    token_ids: list[list[int]] | None = None
    """The tokens of each response, from the first to the EOS, inclusive, without padding."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """The policy's, which made the texts."""

    def __post_init__(self) -> None:
        lengths = {"texts": len(self.texts)} | {f"columns[{name}]": len(v) for name, v in self.columns.items()}
        if self.token_ids is not None:
            lengths["token_ids"] = len(self.token_ids)
        for name, length in lengths.items():
            if length != len(self.prompts):
                raise ValueError(f"`{name}` must have one entry per prompt: {len(self.prompts)}, but got {length}.")

    def shown(self, i: int) -> str:
        """A sample for an error message."""
        return f"prompt {self.prompts[i][-80:]!r}, response {self.texts[i][:80]!r}"


class Scores(NamedTuple):
    """Rewards of B responses."""

    total: Tensor
    """(B,) float32: for one reward what it gives, for several the weighted sum."""
    components: dict[str, Tensor]
    """What is logged by name, each (B,) float32 and unweighted."""
    per_token: Tensor | None = None
    """(B, T) float32: the part of the total that was earned at particular tokens, right-padded with 0. None if none."""


class RewardTerm(Protocol):
    """One reward."""

    name: str

    def __call__(self, given: Responses) -> Tensor | Scores:
        """(B,) rewards; or Scores, if there is more to tell: `per_token`, and `components` to log beside the total."""
