"""Log-probabilities under the reference, computed once and kept on disk: no reference stays in memory.

A file belongs to one reference network (a hash of its weights, configuration and precision is its name), a value in it
to one completion (a hash of its tokens is the key). So nothing that has changed is ever looked up.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..checkpointing import AtomicCheckpointIO
from ..loaders import ResumableLoader
from ..ranks import of_all_ranks
from .backbone import unwrapped

if TYPE_CHECKING:
    from .completions import CompletionModule

KEY_BYTES = 16


class ReferenceCache:
    """Values of completions by key, and the file that they are kept in.

    Args:
        path: the file: `keys` uint8 (N, 16) and `values` float32 (N,).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[bytes, float] = {}

    def read(self) -> None:
        """Take what the file holds, if there is one."""
        if not self.path.exists():
            return
        try:
            saved = torch.load(self.path, weights_only=True)
            keys, values = saved["keys"].numpy(), saved["values"].tolist()
            self.values |= zip((key.tobytes() for key in keys), values, strict=True)
        except Exception as error:  # a zip, a pickle and its content can each be broken in ways of their own
            raise ValueError(
                f"`reference_cache`: `{self.path}` is not a whole cache file ({type(error).__name__}). Delete it, and "
                "its values are computed anew."
            ) from error

    def write(self) -> None:
        """Replace the file, at once."""
        keys = torch.frombuffer(bytearray(b"".join(self.values)), dtype=torch.uint8).view(-1, KEY_BYTES)
        values = torch.tensor(list(self.values.values()), dtype=torch.float32)
        AtomicCheckpointIO().save_checkpoint({"keys": keys, "values": values}, self.path)

    def lookup(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) float32 log π_ref of a batch's completions, on its device."""
        keys = row_keys(batch)
        if absent := sum(key not in self.values for key in keys):
            raise ValueError(
                f"`reference_cache` holds the completions of the data that `fit` was given to train and validate on, "
                f"but {absent} of {len(keys)} in this batch are others, and the reference is gone. Evaluate other data "
                "in a run of its own, without `reference_cache`."
            )
        return torch.tensor([self.values[key] for key in keys], device=batch["input_ids"].device)


def row_keys(batch: dict[str, Tensor]) -> list[bytes]:
    """A hash of each row's tokens and of which of them count; padding is no part of it."""
    names = ("input_ids", "attention_mask", "loss_mask")
    keys = []
    for ids, real, counts in zip(*(batch[name].cpu().numpy() for name in names), strict=True):
        kept = real.astype(bool)
        content = ids[kept].astype("<i8").tobytes() + counts[kept].astype("u1").tobytes()
        keys.append(hashlib.blake2b(content, digest_size=KEY_BYTES).digest())
    return keys


def fingerprint(network: nn.Module, precision: str) -> str:
    """A hash of all that log-probs depend on: weights and their dtype, configuration, the Trainer's precision.

    Adapters are left out, so it is that of the network with its adapter switched off. Of a sharded network all ranks
    must ask for it.
    """
    model = unwrapped(network)
    digest = hashlib.blake2b(f"{precision} {_configuration(model)}".encode(), digest_size=KEY_BYTES)
    state = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    for name, value in sorted(state.items()):
        if "lora_" in name:
            continue
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
        digest.update(whole.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _configuration(model: nn.Module) -> str:
    """What the model's configuration says, but not where it came from."""
    entries = {k: v for k, v in model.config.to_dict().items() if k[0] != "_" and k != "transformers_version"}
    return json.dumps(entries, sort_keys=True, default=str)


def open_cache(folder: str, module: "CompletionModule") -> ReferenceCache:
    """The cache of a module's reference, with what rank 0 finds on disk, on all ranks."""
    with module.reference() as network:
        name = fingerprint(network, module.trainer.precision_plugin.precision)
    cache = ReferenceCache(Path(folder).expanduser() / f"{name}.pt")
    if module.global_rank == 0:
        cache.read()
    cache.values = module.trainer.strategy.broadcast(cache.values)
    return cache


def fill(cache: ReferenceCache, loader: Any, module: "CompletionModule") -> None:
    """Compute what the cache lacks of a loader's completions, each rank its share; rank 0 writes. On all ranks."""
    new: dict[bytes, float] = {}
    for batch in _batches(loader):
        keys = row_keys(batch)
        lacking = torch.tensor(float(any(key not in cache.values for key in keys)), device=module.device)
        if module.sum_over_ranks(lacking) > 0:  # a sharded network takes all ranks or none
            found = module.reference_logprobs(module.trainer.strategy.batch_to_device(batch))
            new |= zip(keys, found.tolist(), strict=True)
    found_anywhere = {key: value for part in of_all_ranks(new) for key, value in part.items()}
    if not found_anywhere:
        return
    cache.values |= found_anywhere
    if module.global_rank == 0:
        cache.write()


def _batches(loader: Any) -> Iterator[dict[str, Tensor]]:
    """The batches that the loader gives in its first epoch, without a pass over it: no order, no generator, no place in
    an epoch is touched."""
    if not isinstance(loader, ResumableLoader):
        raise ValueError(
            f"`reference_cache` needs the loaders of this package's DataModules, but got a {type(loader).__name__}: "
            "train with a `PreferenceDataModule`, or without `reference_cache`."
        )
    for numbers in loader.batches.batches():
        yield loader.collate_fn(loader.dataset[numbers])
