"""What every module here shares: a tokenizer, a backbone, its checkpoints and its export."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpointing import settle
from ..pretrained import load_tokenizer
from .backbone import DTYPES, add_lora, load_causal_lm
from .checks import check_precision, check_strategy, objects_given, require
from .exporting import save_network
from .host_memory import keep_freed_memory
from .optimization import MeanLossModule
from .precision import HalfBackbone
from .quantization import check_4bit
from .reading import set_fast_paths
from .sharding import is_sharded, shard, skeleton_unless_first, unsharded, whole_copy


class TextModule(MeanLossModule):
    """Base of the language modules.

    A checkpoint holds what is trained and nothing else: with LoRA that is the adapters and the heads. The loss is a
    mean over the items of a whole optimizer step, see `MeanLossModule`.

    A subclass builds its networks in `build`; under `--trainer.strategy fsdp2` they are then sharded over the ranks.

    Args:
        model: a hub id, a local folder, `package:NAME`, or a `PreTrainedModel`.
        tokenizer: the same; None takes the model's own.
        dtype: of the backbone's weights: `float32`, `bfloat16` or `float16`. LoRA adapters and scalar heads are
            always float32. This is apart from the Trainer's `precision`, which may stay at `32-true`.
        lora_r: rank of the LoRA adapters; 0 trains every weight. Usual: 8 to 64.
        lora_alpha: LoRA's scale is lora_alpha / lora_r.
        lora_target_modules: names of the layers that get adapters, or `all-linear`.
        lora_last_layers: adapters only in the last so many layers, where the backward pass then stops: less time, less
            memory. None is all layers.
        load_in_4bit: the frozen weights under LoRA in 4 bits (QLoRA), by bitsandbytes; needs an NVIDIA GPU.
        learning_rate: of AdamW at its highest.
        weight_decay: of AdamW.
        adam_eps: of AdamW. RLHF papers often use 1e-5.
        lr_scheduler: shape of the learning rate over the optimizer steps of the run.
        warmup_ratio: share of the steps over which the learning rate rises from 0.
        warmup_steps: the same as a number of optimizer steps, in place of `warmup_ratio`.
        min_lr_ratio: of `cosine_with_min_lr`: where it ends, as a share of `learning_rate`.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        trust_remote_code: run Python code that comes with the model. Off for good reason.
        padding_free: pass sequences through a network in one row instead of padded side by side, where the network is
            of a type that is known to allow it; others are padded. It changes the speed alone.
        fused_logprobs: go from hidden states to log-probabilities without logits in float32, likewise.
        fused_layers: compute the gradients of RMSNorm and of SwiGLU in one go, on a CPU and where their class is known,
            likewise.
        compiled_layers: compile the decoder layers by `torch.compile` for training and scoring, in place of
            `fused_layers`. They compile when they are first used; meant for GPUs.
        fused_optimizer: update all weights in one kernel; not under `16-mixed`, where losses are scaled.
        keep_freed_memory: on a CPU under Linux, let the process keep memory that it has freed, for the next step; see
            `host_memory.py`.
    """

    exported = "network"  # the attribute that holds what `load_network` makes

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        lora_r: int = 0,
        lora_alpha: int = 32,
        lora_target_modules: str | list[str] = "all-linear",
        lora_last_layers: int | None = None,
        load_in_4bit: bool = False,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.0,
        adam_eps: float = 1e-8,
        lr_scheduler: Literal["linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup"] = "linear",
        warmup_ratio: float = 0.0,
        warmup_steps: int | None = None,
        min_lr_ratio: float = 0.1,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        padding_free: bool = True,
        fused_logprobs: bool = True,
        fused_layers: bool = True,
        compiled_layers: bool = False,
        fused_optimizer: bool = True,
        keep_freed_memory: bool = True,
    ) -> None:
        super().__init__()
        require("dtype", dtype in DTYPES, f"one of {list(DTYPES)}", dtype)
        require("lora_r", lora_r >= 0, "at least 0", lora_r)
        require("learning_rate", learning_rate >= 0, "at least 0", learning_rate)
        require("warmup_ratio", 0 <= warmup_ratio <= 1, "between 0 and 1", warmup_ratio)
        require("warmup_ratio", not (warmup_ratio and warmup_steps), "0 where `warmup_steps` is given", warmup_ratio)
        require("warmup_steps", (warmup_steps or 0) >= 0, "at least 0", warmup_steps)
        require("min_lr_ratio", 0 <= min_lr_ratio <= 1, "between 0 and 1", min_lr_ratio)
        # Arguments that are objects (a model, a function) stay out of checkpoints: those load without unpickling.
        self.save_hyperparameters(ignore=objects_given(self, inspect.currentframe()), logger=False)
        self.__dict__["_model_spec"] = model  # else one given as an object would be a submodule beside what it becomes
        self._tokenizer_spec = tokenizer
        self.strict_loading = False  # checkpoints hold only what is trained; on_load_checkpoint checks that
        self._resumed_place: dict[str, int] = {}
        self._is_built = False
        self._rows_seen = 0
        self._seed: int | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; DataModules without one of their own use this."""
        spec = self._tokenizer_spec or self._model_spec
        if isinstance(spec, PreTrainedModel):
            raise ValueError("`tokenizer` is required when `model` is a PreTrainedModel object.")
        return load_tokenizer(spec, self.hparams.trust_remote_code) if isinstance(spec, str) else spec

    # --- building -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse what would fail later, or silently train something else."""
        check_strategy(self.trainer, self.device_mesh)
        precision = self.trainer.precision_plugin
        check_precision(precision.precision, self.hparams.dtype, self.mesh)
        if self.hparams.load_in_4bit:
            check_4bit(self.hparams.lora_r, self.trainer.strategy.root_device, self.mesh)
        if isinstance(precision, HalfPrecision):
            self.trainer.strategy.precision_plugin = HalfBackbone(precision.precision)
        if self.hparams.keep_freed_memory and self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()

    def configure_model(self) -> None:
        """Build the networks, once; under FSDP2 shard them over the ranks."""
        if self._is_built:
            return
        with skeleton_unless_first(self.mesh):
            networks = self.build()
        h = self.hparams
        for network in networks:
            set_fast_paths(network, h.padding_free, h.fused_logprobs, h.fused_layers, h.compiled_layers)
            shard(network, self.mesh)
        self._is_built = True

    def build(self) -> list[nn.Module]:
        """Load the networks, keep them as attributes, and return those that are to be sharded under FSDP2."""
        setattr(self, self.exported, self.load_network())
        return [self.trained_network]

    def load_network(self) -> nn.Module:
        """The network that is trained and exported, as it is before training; shapes only under a meta device.

        Here a causal language model, with adapters if `lora_r` says so.
        """
        how = (self.backbone_dtype, self.hparams.trust_remote_code, self.hparams.load_in_4bit)
        return self.prepare_backbone(load_causal_lm(self._model_spec, *how))

    @property
    def mesh(self) -> DeviceMesh | None:
        """The ranks over which FSDP2 shards; None without it."""
        return None if self.device_mesh is None else self.device_mesh["data_parallel"]

    @property
    def backbone_dtype(self) -> str:
        """`dtype`, or that of the Trainer's `bf16-true`."""
        precision = self._trainer.precision_plugin.precision if self._trainer else None
        return {"bf16-true": "bfloat16", "16-true": "float16"}.get(precision, self.hparams.dtype)

    def prepare_backbone(self, model: PreTrainedModel) -> nn.Module:
        """LoRA and gradient checkpointing as the flags say."""
        hparams = self.hparams
        self.prepare_training(model)
        if not hparams.lora_r:
            return model
        targets = hparams.lora_target_modules
        return add_lora(model, hparams.lora_r, hparams.lora_alpha, targets, hparams.lora_last_layers)

    def prepare_training(self, model: PreTrainedModel) -> None:
        """Gradient checkpointing as the flag says."""
        model.train()  # it does nothing in eval mode; dropout is 0 anyway
        if self.hparams.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # --- seed, ranks, weights of a rollout ----------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        """What `seed_everything` set; without it, what rank 0 drew."""
        if self._seed is None:
            self._seed = self.trainer.strategy.broadcast(torch.initial_seed())
        return self._seed

    @property
    def trained_network(self) -> nn.Module:
        """What `load_network` made: it is trained, samples, and is exported."""
        return getattr(self, self.exported)

    @contextmanager
    def rollout_weights(self, *networks: nn.Module) -> Iterator[None]:
        """Sampling under FSDP2 with weights gathered once, if the strategy says so: by default the policy's."""
        if not (is_sharded(self.trained_network) and self._unshards_rollouts):
            yield
            return
        # Inference mode, in which Lightning may evaluate, would leave tensors that no later backward could use.
        with torch.inference_mode(False), torch.no_grad(), unsharded(*(networks or self.sampled_networks)):
            yield

    @property
    def sampled_networks(self) -> list[nn.Module]:
        """What responses are sampled from."""
        return [self.trained_network]

    @property
    def any_rank(self) -> Callable[[Tensor], Tensor] | None:
        """For `sample`, where each of its forward passes takes all ranks: whether a flag is True on any of them."""
        if not is_sharded(self.trained_network) or self._unshards_rollouts:
            return None
        return lambda flag: self.sum_over_ranks(flag.double()) > 0

    @property
    def _unshards_rollouts(self) -> bool:
        return getattr(self.trainer.strategy, "unshard_rollouts", True)

    def on_train_start(self) -> None:
        """An epoch that a stopped run began goes on where it stood: its loader, its means and extremes."""
        if self._resumed_place:
            # Lightning does so too, but not if the loader is there before the checkpoint is read; and it is, since
            # `configure_optimizers` asks for the length of the run.
            self.trainer.train_dataloader.load_state_dict(self._resumed_place)
        self._resumed_place = {}
        self.resume_running()

    def _place(self) -> dict[str, int]:
        return getattr(self.trainer.train_dataloader, "state_dict", dict)()

    def is_within_epoch(self) -> bool:
        """Whether some of the epoch's batches are done, and others are not."""
        place = self._place()
        return 0 < place.get("batches", 0) < place.get("of", 0)

    # --- rows of an evaluation --------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Number the rows anew."""
        self._rows_seen = 0

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def next_rows(self, count: int) -> list[int]:
        """Numbers of the next rows of this rank in an evaluation: row i of the data is on rank i % world_size."""
        first, self._rows_seen = self._rows_seen, self._rows_seen + count
        return [(first + i) * self.trainer.world_size + self.global_rank for i in range(count)]

    # --- checkpoints and export -----------------------------------------------------------------------------------

    def trained_names(self) -> set[str]:
        """Names in the state dict of what is trained."""
        return {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what is trained."""
        trained = self.trained_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["module_class"], checkpoint["dtype"] = type(self).__name__, self.backbone_dtype
        checkpoint["place"] = self._place()
        if self.is_within_epoch():
            checkpoint["running"] = self.running_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another module, or of another network."""
        saved_by = checkpoint.get("module_class", "another library")
        missing = self.trained_names() - checkpoint["state_dict"].keys()
        if saved_by != type(self).__name__ or missing:
            raise ValueError(
                f"The checkpoint was written by {saved_by} and does not fit this {type(self).__name__}: "
                f"{len(missing)} of its trained tensors are not in the file{_examples(missing)}. Give the checkpoint "
                "of the same module, with the same `model` and `lora_r`."
            )
        settle(checkpoint)
        self._resumed_place, self._resumed_running = checkpoint["place"], checkpoint.get("running", {})
        # What is frozen comes from the model itself: with it the file is whole, and Lightning has nothing to warn of.
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]

    def save_pretrained(self, folder: str | Path, merge: bool = True) -> None:
        """Write a Hugging Face folder: weights (LoRA merged, or only the adapter), config, tokenizer. On all ranks."""
        require("merge", merge or self.hparams.lora_r > 0, "True, for there is no adapter (`lora_r` is 0)", merge)
        network = self.trained_network
        if is_sharded(network):
            network = whole_copy(network, self.load_network)
        if rank_zero_only.rank == 0:
            save_network(network, folder, base=None if merge else self._model_spec)
            self.tokenizer.save_pretrained(folder)


def _examples(names: set[str]) -> str:
    return f", such as `{min(names)}`" if names else ""
