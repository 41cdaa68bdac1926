"""Rewards by reward models: one, or an ensemble whose members may disagree."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..pretrained import load_tokenizer
from .checks import require
from .reading import set_fast_paths
from .reward_terms import Responses, Scores
from .scorer import Scorer
from .sharding import num_chunks, shard, skeleton_unless_first
from .sharing import SharedBase, load_scorer


class ModelReward:
    """A reward model read at the end of prompt + response + EOS, with its own tokenizer.

    The network is no submodule of the policy's module: it is in no optimizer and no checkpoint. If it is an adapter on
    the base model of a policy with LoRA, it stands on the policy's own weights: see `sharing.py`.

    Args:
        model: the folder that `RewardModule` exported, a hub id of a reward model, a `.ckpt` file of a
            `RewardModule`, or a `RewardModule`.
        dtype: of the backbone's weights.
        batch_size: most texts in one forward.
        load_in_4bit: backbone in 4 bits, as a policy's must be to be shared with; see `TextModule`.
        padding_free: see `TextModule`.
    """

    def __init__(
        self,
        model: object,
        dtype: str = "float32",
        batch_size: int = 32,
        load_in_4bit: bool = False,
        padding_free: bool = True,
    ) -> None:
        self.name = "reward_model"
        self._spec, self._dtype, self._batch_size, self._load_in_4bit = model, dtype, batch_size, load_in_4bit
        self._padding_free = padding_free
        self._scorer: Scorer | None = None
        self._mesh: DeviceMesh | None = None

    def _load(self, base: SharedBase | None = None) -> None:
        from .reward import RewardModule  # a reward module is built on this package's parts, not the other way round

        module = self._spec
        if isinstance(module, str) and module.endswith(".ckpt"):
            module = RewardModule.load_from_checkpoint(module, map_location="cpu", weights_only=True)
        if isinstance(module, RewardModule):
            module.configure_model()
            self._scorer, self._tokenizer = module.network, module.tokenizer
        else:
            scorer = load_scorer(module, self._dtype, load_in_4bit=self._load_in_4bit, base=base)
            self._scorer, self._tokenizer = scorer, load_tokenizer(module)
        self._scorer.eval().requires_grad_(False)
        set_fast_paths(self._scorer, self._padding_free, fused_logprobs=False, fused_layers=False)

    @torch.no_grad()
    def __call__(self, given: Responses) -> Tensor:
        """(B,) normalised scores."""
        if self._scorer is None:
            self._load()
        ids = [
            [*self._tokenizer(prompt + response)["input_ids"], self._tokenizer.eos_token_id]
            for prompt, response in zip(given.prompts, given.texts, strict=True)
        ]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # like lengths together: little padding
        scores = torch.empty(len(ids), dtype=torch.float32)
        for chunk in torch.tensor(order).tensor_split(num_chunks(len(ids), self._batch_size, self._mesh)):
            scores[chunk] = self._score([ids[i] for i in chunk.tolist()]).float().cpu()
        return scores

    def _score(self, ids: list[list[int]]) -> Tensor:
        device = self._scorer.head.weight.device
        length = max(map(len, ids))
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], device=device)
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids], device=device)
        return self._scorer(padded, mask)

    def to(self, device: torch.device, mesh: DeviceMesh | None = None, base: SharedBase | None = None) -> "ModelReward":
        """Load the model, if it is not yet, on the policy's base if that is its own, and move it.

        Under FSDP2 shard it over the ranks of the mesh.
        """
        if self._scorer is None:
            self._mesh = mesh
            with skeleton_unless_first(mesh):
                self._load(base)
            shard(self._scorer, mesh)
        self._scorer.to(device)
        return self


class EnsembleReward:
    """Several reward models; where they disagree, the reward is less than their mean.

    reward = mean_k r_k − penalty · std_k r_k,    or, conservative, min_k r_k

    A policy that has found the weak spot of one model has not yet found that of the others. Members should have the
    same scale, as those of `RewardModule` do, and differ in their seed or their data. Mean and standard deviation
    (biased, over the members) are logged as `<name>/mean` and `<name>/std`.

    Both are Coste et al. 2023 (https://arxiv.org/abs/2310.02743), except that their penalty is of the variance. The
    standard deviation has the unit of the reward, and is what Eisenstein et al. 2023 take off
    (https://arxiv.org/abs/2312.09244).

    Args:
        models: folders, hub ids or `.ckpt` files, at least two.
        uncertainty_penalty: price of one standard deviation of disagreement. Usual: 0.5 to 2.
        conservative: take the lowest of the members' scores, whatever the penalty.
        dtype: of the backbones' weights.
        batch_size: most texts in one forward.
        load_in_4bit: backbones in 4 bits, as a policy's must be to be shared with; see `TextModule`.
        padding_free: see `TextModule`.
    """

    def __init__(
        self,
        models: list[str],
        uncertainty_penalty: float = 1.0,
        conservative: bool = False,
        dtype: str = "float32",
        batch_size: int = 32,
        load_in_4bit: bool = False,
        padding_free: bool = True,
    ) -> None:
        is_several = isinstance(models, list | tuple) and len(models) >= 2
        require("models", is_several, "a list of at least two reward models", models)
        require("uncertainty_penalty", uncertainty_penalty >= 0, "at least 0", uncertainty_penalty)
        self.name = "ensemble"
        how = (dtype, batch_size, load_in_4bit, padding_free)
        self.members = [ModelReward(model, *how) for model in models]
        self.uncertainty_penalty, self.conservative = uncertainty_penalty, conservative

    def __call__(self, given: Responses) -> Scores:
        """Rewards, with mean and standard deviation over the members."""
        scores = torch.stack([member(given) for member in self.members])  # (members, B)
        mean, std = scores.mean(0), scores.std(0, correction=0)
        total = scores.amin(0) if self.conservative else mean - self.uncertainty_penalty * std
        return Scores(total, {"mean": mean, "std": std})

    def to(
        self, device: torch.device, mesh: DeviceMesh | None = None, base: SharedBase | None = None
    ) -> "EnsembleReward":
        """Load the models, if they are not yet, and move them, or spread them over a mesh; see `ModelReward`."""
        for member in self.members:
            member.to(device, mesh, base)
        return self
