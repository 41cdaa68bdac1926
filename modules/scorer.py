"""A backbone with one scalar per token: reward models and separate value networks."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..functional import last_index
from ..pretrained import load_config, resolve
from .backbone import DTYPES, NORMALIZER, adapter_base, attach_adapter, narrowed, quantization, unwrapped, with_adapter
from .quantization import is_4bit
from .reading import Passage


class Scorer(nn.Module):
    """A backbone with one scalar per token: a reward model, or a separate value network.

    As a reward model it is read at the last real token and normalised: score = (raw − mean) / std. Mean and standard
    deviation live in the model's config, so they travel with `save_pretrained`.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def load(
        cls, spec: str | PreTrainedModel, dtype: str, trust_remote_code: bool = False, load_in_4bit: bool = False
    ) -> "Scorer":
        """From the folder of a reward model, or of its adapter, or from a language model, which gets a new head.

        A new head is drawn from N(0, 1/(H + 1)) (Stiennon et al. 2020, https://arxiv.org/abs/2009.01325). Under
        `torch.device("meta")` it is the model's shape without weights. With `load_in_4bit` the weights of the
        backbone's linear layers have 4 bits; the head never has.
        """
        quantized = quantization(spec, dtype, load_in_4bit)
        if isinstance(spec, PreTrainedModel):
            narrowed(spec.base_model, dtype)
            spec.score.float()
            return cls(spec)
        if base := adapter_base(spec):
            return cls.load(base, "float32", trust_remote_code).with_adapter(spec, dtype)
        config = load_config(spec, trust_remote_code)
        is_new = not any("SequenceClassification" in name for name in config.architectures or [])
        config.num_labels = 1
        if torch.get_default_device().type == "meta":
            model = AutoModelForSequenceClassification.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        else:
            with _heads_in_float32(config) as is_sure:
                model = AutoModelForSequenceClassification.from_pretrained(
                    resolve(spec),
                    config=config,
                    dtype=DTYPES[dtype] if is_sure and not quantized else torch.float32,
                    trust_remote_code=trust_remote_code,
                    **quantized,
                )
        narrowed(model.base_model, dtype)
        model.score.float()  # a new head is not yet
        scorer = cls(model)
        if is_new:
            nn.init.normal_(scorer.head.weight, std=(scorer.head.weight.shape[-1] + 1) ** -0.5)
        return scorer

    def with_adapter(self, folder: str, dtype: str) -> "Scorer":
        """This network with what is in an adapter's folder: LoRA, head, normaliser; its backbone in `dtype`."""
        scorer = Scorer(with_adapter(self.model, folder))
        narrowed(scorer.model.base_model, dtype)
        return scorer.with_normalizer(folder)

    def beside_adapter(self, folder: str) -> "Scorer":
        """The same with the LoRA layers left beside the weights, to be trained further, or to share the weights."""
        return Scorer(attach_adapter(self.model, folder)).with_normalizer(folder)

    def with_normalizer(self, folder: str) -> "Scorer":
        """This network with the normaliser in an adapter's folder, if there is one, and what else is said there."""
        if (normalizer := Path(folder, NORMALIZER)).is_file():
            said = json.loads(normalizer.read_text())
            if objective := said.pop("objective", None):
                unwrapped(self.model).config.reward_objective = objective
            self.set_normalizer(**said)
        return self

    def called_modules(self) -> list[nn.Module]:
        """The parts that are called as modules, for sharding."""
        return [unwrapped(self.model).base_model, self.head]

    @property
    def head(self) -> nn.Linear:
        """The scalar head."""
        return unwrapped(self.model).score

    @property
    def mean(self) -> float:
        """Mean raw score of the reference text; 0 before it was fitted."""
        return getattr(unwrapped(self.model).config, "reward_mean", 0.0)

    @property
    def std(self) -> float:
        """Standard deviation of the raw scores of the reference text; 1 before it was fitted."""
        return getattr(unwrapped(self.model).config, "reward_std", 1.0)

    def set_normalizer(self, mean: float, std: float) -> None:
        """Let scores from now on be (raw − mean) / std."""
        config = unwrapped(self.model).config
        config.reward_mean, config.reward_std = mean, std

    def raw_per_token(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) float32: the head at every real token."""
        passage = Passage.of(self.model, input_ids, attention_mask, attention_mask.bool())
        return passage.padded(self._scalars(self._hidden(passage)))

    def raw(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B,) float32: the head at the last real token of each sequence, not normalised."""
        last = torch.zeros_like(attention_mask, dtype=torch.bool)
        last.scatter_(1, last_index(attention_mask.bool())[:, None], True)
        passage = Passage.of(self.model, input_ids, attention_mask, last)
        return self._scalars(passage.rows(self._hidden(passage), last))

    def _hidden(self, passage: Passage) -> Tensor:
        return unwrapped(self.model).base_model(**passage.inputs).last_hidden_state

    def _scalars(self, hidden: Tensor) -> Tensor:
        return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B,) float32: normalised scores."""
        return (self.raw(input_ids, attention_mask) - self.mean) / self.std

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder for `AutoModelForSequenceClassification`, adapters merged, normaliser in the config."""
        merged(self.model).save_pretrained(folder)


@contextmanager
def _heads_in_float32(config: PreTrainedConfig) -> Iterator[bool]:
    """Load scalar heads in float32, whatever the dtype: they are small, and all there is between backbone and reward.

    Yields whether that is sure. It is not of classes that are no part of transformers; they are loaded in float32 and
    then narrowed.
    """
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None:
        yield False
        return
    before = kind._keep_in_fp32_modules_strict
    kind._keep_in_fp32_modules_strict = {*(before or ()), "score"}
    try:
        yield True
    finally:
        kind._keep_in_fp32_modules_strict = before


def merged(network: "PreTrainedModel | PeftModel | Scorer") -> PreTrainedModel:
    """A Hugging Face model without adapters that computes the same; the given one is left as it is."""
    model = network.model if isinstance(network, Scorer) else network
    if is_4bit(model):
        raise ValueError(
            "`load_in_4bit`: an adapter cannot be merged into weights of 4 bits. Write the adapter, with `--lora "
            "adapter` or `save_pretrained(folder, merge=False)`: every `model` flag takes its folder, and merges it "
            "into the base model as that was before."
        )
    return copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model
