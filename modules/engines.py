"""Who samples the responses: by default `rollout.sample`; optionally an inference engine beside the trainer.

An engine has weights of its own, which follow the trained ones before every rollout, and kernels of its own, so that
its log-probabilities differ a little. Methods never use them: they are computed again by the trainer, and how far the
two are apart is logged as `rollout/sampler_gap`.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .backbone import unwrapped
from .rollout import Rollout, Sampling


class RolloutEngine(ABC):
    """Samples one response to each prompt, from the weights that a network has now."""

    @abstractmethod
    def sample(
        self, network: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, sampling: Sampling, seeds: list[int]
    ) -> Rollout:
        """Responses from softmax(logits / temperature), as `rollout.sample` gives them.

        Args:
            network: a causal LM, with its weights whole; of LoRA with the adapter on, or off.
            prompt_ids: (B, P), left-padded.
            prompt_mask: (B, P), True at prompt tokens.
            sampling: lengths, temperature, EOS.
            seeds: one of each row.
        """


class VLLMEngine(RolloutEngine):
    """vLLM in the trainer's own process and on its own device. Nothing else of this project needs it to be installed.

    Args:
        gpu_memory_utilization: share of the device's memory for the engine: its weights and its key-value cache.
        max_model_len: longest prompt with its response, in tokens; None takes the model's own limit.
        options: further arguments of `vllm.LLM`.
    """

    def __init__(
        self,
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.options = {"gpu_memory_utilization": gpu_memory_utilization, "max_model_len": max_model_len}
        self.options |= options or {}
        self._llm: Any = None

    def sample(
        self, network: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, sampling: Sampling, seeds: list[int]
    ) -> Rollout:
        """By `vllm.LLM.generate`, after the network's weights were written over the engine's."""
        vllm = require_vllm()
        if self._llm is None:
            self._llm = self._start(vllm, network)
        # In place and without a copy: the engine lives in this process.
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": whole_weights(network)})
        self._llm.reset_prefix_cache()  # it was of the old weights
        shared = dict(
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            min_tokens=sampling.min_new_tokens,
            stop_token_ids=list(sampling.eos_token_ids),
            logprobs=0,  # of the sampled token alone
            detokenize=False,
        )
        prompts = [
            {"prompt_token_ids": row[mask].tolist()} for row, mask in zip(prompt_ids, prompt_mask > 0, strict=True)
        ]
        params = [vllm.SamplingParams(seed=seed, **shared) for seed in seeds]
        answers = [answer.outputs[0] for answer in self._llm.generate(prompts, params, use_tqdm=False)]
        ids = [list(answer.token_ids) for answer in answers]
        logprobs = [
            [said[token].logprob for token, said in zip(row, answer.logprobs, strict=True)]
            for row, answer in zip(ids, answers, strict=True)
        ]
        return as_rollout(prompt_ids, prompt_mask, sampling, ids, logprobs)

    def _start(self, vllm: Any, network: nn.Module) -> Any:
        """An engine for models of this shape; the weights come later."""
        bare = unwrapped(network)
        how = _among_ranks() if dist.is_initialized() and dist.get_world_size() > 1 else {}
        with TemporaryDirectory() as folder:
            bare.config.save_pretrained(folder)
            return vllm.LLM(
                model=folder,
                skip_tokenizer_init=True,
                load_format="dummy",
                dtype=str(bare.dtype).removeprefix("torch."),
                generation_config="vllm",  # no sampling parameters from the model's folder
                logprobs_mode="processed_logprobs",  # at the temperature, without what min_tokens forbids
                **how,
                **self.options,
            )


def _among_ranks() -> dict[str, str]:
    """Arguments of an engine of its own on each of several ranks; vLLM reads its place from the environment."""
    os.environ.setdefault("RANK", str(dist.get_rank()))
    os.environ.setdefault("LOCAL_RANK", "0")
    return {"distributed_executor_backend": "external_launcher"}


def require_vllm() -> Any:
    """The module, set up to live in this process.

    Raises:
        ValueError: where it is not installed.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read when vLLM is imported
    try:
        import vllm
    except ImportError as error:
        raise ValueError(
            f"`rollout_engine` VLLMEngine needs vLLM, which cannot be imported here ({error}): install it, in an "
            "environment of its own, for it wants its own versions, or leave `rollout_engine` out to sample without it."
        ) from error
    return vllm


def whole_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a causal LM as a Hugging Face folder has them; LoRA adapters that are on are added in.

    One after the other, so that no second copy of the model is ever there.
    """
    bare = unwrapped(network)
    adapted = {name: module for name, module in bare.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in bare.named_parameters():
        owner = next((of for of in adapted if name.startswith(f"{of}.")), None)
        if owner is None:
            yield name, parameter.detach()
        elif name.startswith(f"{owner}.base_layer."):
            weight = parameter.detach()
            if name.endswith(".weight") and not adapted[owner].disable_adapters:
                for adapter in adapted[owner].active_adapters:
                    weight = weight + adapted[owner].get_delta_weight(adapter).detach().to(weight.dtype)
            yield name.replace(".base_layer.", "."), weight


def as_rollout(
    prompt_ids: Tensor, prompt_mask: Tensor, sampling: Sampling, ids: list[list[int]], logprobs: list[list[float]]
) -> Rollout:
    """Responses of unequal length, padded to `max_new_tokens`."""
    device, width = prompt_ids.device, sampling.max_new_tokens
    lengths = torch.tensor([len(row) for row in ids], device=device)
    mask = torch.arange(width, device=device) < lengths[:, None]
    eos = set(sampling.eos_token_ids)
    ended = torch.tensor([bool(row) and row[-1] in eos for row in ids], device=device)

    def padded(rows: list[list], value: float, dtype: torch.dtype) -> Tensor:
        rows = [torch.tensor(row, dtype=dtype) for row in rows]
        rows.append(torch.empty(width, dtype=dtype))  # for the width
        return pad_sequence(rows, batch_first=True, padding_value=value)[:-1].to(device)

    response_ids = padded(ids, sampling.pad_token_id, torch.long)
    sampled = padded(logprobs, 0.0, torch.float32)
    return Rollout(prompt_ids, prompt_mask.bool(), response_ids, mask, ended, sampled)
