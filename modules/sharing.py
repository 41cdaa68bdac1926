"""One frozen base model under policy, reference, value network and reward models.

A policy with LoRA leaves its base as it was, and a reward model that was trained with LoRA from the same folder has the
same base. It then takes the policy's Parameters, the very same objects, and of its own has only adapters and a head:

    python train.py fit --config configs/reward.yaml --model.model sft --model.lora_r 16   # exported with lora: adapter
    python train.py fit --config configs/ppo.yaml --model.model sft --model.lora_r 16 \\
        --model.reward reward/model --model.value_model reward/model

Nothing needs to be said for it: what is computed is the same, up to the rounding of a merge. Weights that are sharded
over ranks (FSDP2) are not shared, since sharding replaces Parameters.
"""

import copy
from pathlib import Path

import lightning as L
import torch
from peft import PeftConfig, PeftModel, PeftType, load_peft_weights
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..pretrained import load_config, resolve
from .backbone import adapter_base
from .quantization import is_4bit
from .scorer import Scorer


class SharedBase:
    """A policy's frozen base, on which other networks stand with adapters of their own.

    They are module trees of their own, of which only Parameters and buffers are the policy's. So no adapter is ever
    switched: neither the reference, which is the policy with its adapter off, nor gradient checkpointing, which
    computes a forward again in the backward, can meet another network's adapter.

    Args:
        policy: a network with LoRA.
        spec: what its base was loaded from.
        dtype: with which it was loaded.
        trust_remote_code: likewise.
    """

    def __init__(self, policy: PeftModel, spec: str, dtype: str, trust_remote_code: bool = False) -> None:
        self._policy, self._spec, self._trust_remote_code = policy, spec, trust_remote_code
        self._loaded = (place(spec), dtype, trust_remote_code, is_4bit(policy))

    def scorer(self, spec: str, dtype: str, trust_remote_code: bool, load_in_4bit: bool) -> Scorer | None:
        """What `Scorer.load` would load, on this base, with a head whose weights are not set; None if it differs."""
        if (place(spec), dtype, trust_remote_code, load_in_4bit) != self._loaded:
            return None
        config = load_config(spec, trust_remote_code)
        config.num_labels = 1
        options = dict(dtype=torch.float32, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, **options)
        base = self._base_model()
        if type(model.base_model) is not type(base) or not hasattr(model, "score"):
            return None
        setattr(model, model.base_model_prefix, base)
        model.is_loaded_in_4bit = load_in_4bit  # peft asks
        model.score.to_empty(device=base.device)
        nn.init.zeros_(model.score.weight)
        return Scorer(model)

    def _base_model(self) -> PreTrainedModel:
        """The policy's backbone without its adapters: new modules, the same tensors."""
        tensors = [*self._policy.parameters(), *self._policy.buffers()]
        bare = copy.deepcopy(self._policy, memo={id(tensor): tensor for tensor in tensors}).unload()
        return bare.base_model


def shared_base(module: L.LightningModule) -> SharedBase | None:
    """What the other networks of an `OnPolicyModule` may stand on; None if every weight of its policy is trained."""
    hparams = module.hparams
    if module.mesh is not None or not isinstance(module.policy, PeftModel) or "model" not in hparams:
        return None  # a model given as an object is no hyperparameter, and comes from no folder
    return SharedBase(module.policy, hparams.model, module.backbone_dtype, hparams.trust_remote_code)


def load_scorer(
    spec: str | PreTrainedModel,
    dtype: str,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    base: SharedBase | None = None,
    keep_adapter: bool = False,
) -> Scorer:
    """`Scorer.load`, but a reward model's adapter that belongs to `base` is put on that.

    Args:
        spec: the folder of a reward model or of its adapter, or a language model.
        dtype: of the backbone.
        trust_remote_code: run Python code that comes with the model.
        load_in_4bit: see `TextModule`.
        base: the policy's.
        keep_adapter: of a reward model's adapter also on a base of its own: leave it beside the weights, to be trained
            further. Else it is merged, except into weights of 4 bits.
    """
    how = (dtype, trust_remote_code, load_in_4bit)
    under = adapter_base(spec)
    if not under or not is_reward_adapter(spec):
        return Scorer.load(spec, *how)
    shared = None if base is None else base.scorer(under, *how)
    if shared is not None:
        return shared.beside_adapter(spec)
    if keep_adapter or load_in_4bit:
        return Scorer.load(under, *how).beside_adapter(spec)
    return Scorer.load(spec, *how)


def is_reward_adapter(folder: str) -> bool:
    """Whether an adapter's folder holds LoRA layers and a head, and nothing that would change the base model."""
    config = PeftConfig.from_pretrained(folder)
    if config.peft_type != PeftType.LORA or config.bias != "none" or not isinstance(config.init_lora_weights, bool):
        return False
    names = load_peft_weights(folder, device="cpu").keys()
    heads = {name for name in names if name.startswith("base_model.model.score.")}
    return bool(heads) and all("lora_" in name for name in names - heads)


def place(spec: str) -> str:
    """The hub id or the absolute path of a spec, by which two of them can be compared."""
    folder = resolve(spec)
    return str(Path(folder).resolve()) if Path(folder).exists() else folder
