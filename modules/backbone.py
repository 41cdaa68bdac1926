"""Language models and scalar heads: loading, LoRA, freezing, and the two ways a network is read.

A *causal LM* is read at the response positions (`response_outputs`), a *scorer* at the last token for a reward or at
every token for values (`Scorer`).
"""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME

from ..functional import last_index, position_ids
from ..pretrained import load_config, resolve
from .quantization import in_4bit, is_4bit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NORMALIZER = "reward_normalizer.json"
"""In an adapter's folder, which has no config.json: with one, transformers would look for the whole model there."""


def load_causal_lm(
    spec: str | PreTrainedModel, dtype: str, trust_remote_code: bool = False, load_in_4bit: bool = False
) -> PreTrainedModel:
    """The causal language model of a spec (see `lightning_rlhf.pretrained`), dropout off, in `dtype`.

    Of a peft adapter's folder it is the base model with the adapter merged into it. Under `torch.device("meta")` it is
    the model's shape without weights. With `load_in_4bit` the weights of linear layers have 4 bits, the others `dtype`.
    """
    quantized = quantization(spec, dtype, load_in_4bit)
    if base := adapter_base(spec):
        return with_adapter(load_causal_lm(base, dtype, trust_remote_code), spec)
    if torch.get_default_device().type == "meta":
        config = spec.config if isinstance(spec, PreTrainedModel) else load_config(spec, trust_remote_code)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
    elif isinstance(spec, PreTrainedModel):
        model = narrowed(spec, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            resolve(spec),
            config=load_config(spec, trust_remote_code),
            dtype=DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            **quantized,
        )
    model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    return model


def _contiguous(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Input of a language-model head, in one piece.

    `logits_to_keep` hands the head a view of the last positions. For a view times a frozen weight, torch.matmul chooses
    a batched product and copies the (V, H) weight once per sequence: gigabytes, and most of a rollout's time.
    """
    return (args[0].contiguous(),)


def narrowed(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The model with its parameters in `dtype`, in place; packed ones stay, and so do buffers.

    Buffers hold the frequencies of rotary positions, whose rounding errors would be multiplied by the position.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(DTYPES[dtype])
    return model


def quantization(spec: str | PreTrainedModel, dtype: str, load_in_4bit: bool) -> dict[str, Any]:
    """Further arguments of `from_pretrained`."""
    if not load_in_4bit:
        return {}
    if isinstance(spec, PreTrainedModel) or adapter_base(spec):
        what = "a model object" if isinstance(spec, PreTrainedModel) else f"the adapter `{spec}`"
        raise ValueError(
            f"`load_in_4bit` reads a whole model's folder or hub id, but got {what}. Save it first as a whole model: "
            "`save_pretrained`, or for a checkpoint `train.py export` with `--lora merged`."
        )
    return in_4bit(DTYPES[dtype])


def adapter_base(spec: str | PreTrainedModel) -> str | None:
    """Where the base model of a peft adapter's folder is; None for any other spec."""
    if (
        isinstance(spec, PreTrainedModel)
        or not Path(spec, ADAPTER_CONFIG).is_file()
        or Path(spec, CONFIG_NAME).exists()
    ):
        return None
    base = PeftConfig.from_pretrained(spec).base_model_name_or_path
    if base is None or (Path(base).is_absolute() and not Path(base).exists()):
        raise ValueError(
            f"`{spec}` is an adapter, but its base model is not at `{base}`: set `base_model_name_or_path` in its "
            f"{ADAPTER_CONFIG} to the place where that is."
        )
    return base


def with_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The model with a peft adapter merged into its weights; a model without weights as it is."""
    if model.device.type == "meta":
        return model
    config = PeftConfig.from_pretrained(folder)
    config.task_type = None  # peft's class for language models fits no scorer, which may start from one's adapter
    adapted = PeftModel.from_pretrained(model, folder, config=config, torch_device=str(model.device))
    return adapted.merge_and_unload().requires_grad_(True)


def attach_adapter(model: PreTrainedModel, folder: str) -> PeftModel:
    """The model frozen, with the LoRA layers of a peft adapter's folder beside its weights, and they are trainable.

    A scalar head is trained whole, and starts as the folder's. Of a model without weights this is the shape.
    """
    config = PeftConfig.from_pretrained(folder)
    # Without `modules_to_save` peft leaves the head where it is, instead of putting a copy beside it.
    config.task_type, config.modules_to_save, config.inference_mode, config.lora_dropout = None, None, False, 0.0
    adapted = PeftModel(model, config)
    if model.device.type != "meta":
        found = set_peft_model_state_dict(adapted, load_peft_weights(folder, device=str(model.device)))
        strange = [*found.unexpected_keys, *(name for name in found.missing_keys if "lora_" in name)]
        if strange:
            raise ValueError(f"The adapter `{folder}` does not fit its base model, see `{strange[0]}`.")
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    return adapted


def add_lora(
    model: PreTrainedModel, r: int, alpha: int, target_modules: str | list[str], last_layers: int | None = None
) -> PeftModel:
    """`model` frozen, with trainable LoRA adapters (float32 whatever the model's dtype).

    With `last_layers` only the last so many layers get adapters; the backward pass then stops there.

    Source: Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685; the work is peft's.
    """
    has_head = hasattr(model, "score")  # a scalar head is trained whole
    layers = model.config.get_text_config().num_hidden_layers
    if last_layers is not None and not 1 <= last_layers <= layers:
        raise ValueError(
            f"`lora_last_layers` must be between 1 and the model's {layers} layers, but got {last_layers}."
        )
    if target_modules == "all-linear":
        linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        linear -= {"lm_head", "score"}
        if not linear:
            raise ValueError(
                f"`lora_r` must be 0 for a model of type `{model.config.model_type}`, which has no linear layers that "
                f"adapters could go with, but got {r}."
            )
        if last_layers is not None:  # peft takes layers only with names
            target_modules = sorted(linear)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=target_modules,
        exclude_modules=["score"] if has_head else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        layers_to_transform=None if last_layers is None else list(range(layers - last_layers, layers)),
    )
    adapted = get_peft_model(model, config)
    if has_head:
        model.score.requires_grad_(True)
    return adapted


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The Hugging Face model itself; LoRA layers stay inside it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


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


def logits_at(model: PreTrainedModel | PeftModel, input_ids: Tensor, attention_mask: Tensor, where: Tensor) -> Tensor:
    """(N, V) logits at the N positions where `where` (B, L) is True, and nowhere else.

    The vocabulary makes logits the largest tensor by far. Only the language-model head sees the selection, so whatever
    a model does to its logits afterwards (soft caps, scales) is still done.
    """

    def select(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0][where][None],)

    hook = unwrapped(model).get_output_embeddings().register_forward_pre_hook(select)
    try:
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[0]
    finally:
        hook.remove()


class ResponseOutputs(NamedTuple):
    """What a causal LM says about the response tokens; index t is read *before* token t."""

    logits: Tensor
    """(B, T, V), in the model's dtype."""
    hidden: Tensor
    """(B, T + 1, H), the last hidden state, which the value head reads; index T is after the last token."""


def response_outputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, num_tokens: int) -> ResponseOutputs:
    """One forward pass over prompt + response, kept only at the last `num_tokens` = T tokens.

    Args:
        model: a causal LM with the Hugging Face forward signature.
        input_ids: (B, P + T).
        attention_mask: (B, P + T), the prompt left-padded, the response right-padded.
        num_tokens: T.
    """
    out = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        logits_to_keep=num_tokens + 1,  # the position before the first response token predicts it
        output_hidden_states=True,
        use_cache=False,
    )
    return ResponseOutputs(out.logits[:, :-1], out.hidden_states[-1][:, -num_tokens - 1 :])


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
        # Loaded in float32 and then narrowed, so that the head keeps every digit: it is small, and it is all there is
        # between the backbone and the reward.
        options = dict(dtype=torch.float32, trust_remote_code=trust_remote_code)
        if torch.get_default_device().type == "meta":
            model = AutoModelForSequenceClassification.from_config(config, **options)
        else:
            options |= quantized
            model = AutoModelForSequenceClassification.from_pretrained(resolve(spec), config=config, **options)
        narrowed(model.base_model, dtype)
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
        """(B, L) float32: the head at every token."""
        base = unwrapped(self.model)
        hidden = base.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).last_hidden_state
        return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()

    def raw(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B,) float32: the head at the last real token of each sequence, not normalised."""
        per_token = self.raw_per_token(input_ids, attention_mask)
        return per_token.gather(1, last_index(attention_mask.bool())[:, None]).squeeze(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B,) float32: normalised scores."""
        return (self.raw(input_ids, attention_mask) - self.mean) / self.std

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder for `AutoModelForSequenceClassification`, adapters merged, normaliser in the config."""
        merged(self.model).save_pretrained(folder)
