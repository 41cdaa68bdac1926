"""A language small enough to list: the policy that maximises E[reward] − β KL is known in closed form.

    π*(response) ∝ π_ref(response) · exp(reward(response) / β)

(Korbak et al. 2022, https://arxiv.org/abs/2205.11275). Three letters and EOS, at most three tokens: 40 responses, each
with a random reward. Whatever samples, masks, shapes rewards, estimates advantages or clips wrongly ends elsewhere.
"""

import copy
import itertools
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_rlhf.modules import PPOModule
from lightning_rlhf.modules.backbone import response_outputs

EOS, LETTERS, LENGTH = 0, (1, 2, 3), 3


class Point(NamedTuple):
    """Where a policy stands."""

    reward: float
    """Expected reward."""
    kl: float
    """KL to the reference, in nats per response."""
    distance: float
    """Total variation to the optimum: half the sum of absolute differences."""


class LetterTokenizer:
    """Just enough of a tokenizer: ids 1, 2, 3 are the letters a, b, c."""

    eos_token_id = pad_token_id = EOS

    def decode(self, ids: list[int]) -> str:
        return "".join("?abc"[i] for i in ids)


def responses() -> list[tuple[int, ...]]:
    """All responses: up to two letters and EOS, or three letters cut at the limit."""
    ended = [(*letters, EOS) for n in range(LENGTH) for letters in itertools.product(LETTERS, repeat=n)]
    return ended + list(itertools.product(LETTERS, repeat=LENGTH))


class Toy:
    """The language, its rewards and its optimum.

    Args:
        seed: of the reward table and the reference policy.
        beta: β, the price of a nat.
    """

    # Rotary positions are relative: after a letter as prompt, "b" and "bb" would look the same to the model.
    prompt = (EOS,)

    def __init__(self, seed: int, beta: float = 0.5) -> None:
        self.beta = beta
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(len(responses()), generator=generator, dtype=torch.float64)
        self._by_text = {
            LetterTokenizer().decode([t for t in response if t]): reward.item()
            for response, reward in zip(responses(), self.table, strict=True)
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = LlamaForCausalLM(_config())
        self.reference = log_distribution(self.model)

    def reward(self, prompts: list[str], responses: list[str], **columns: list) -> list[float]:
        """The table, as a reward function."""
        return [self._by_text[response] for response in responses]

    def optimum(self, beta: float | None = None) -> Tensor:
        """log π*, over `responses()`."""
        return (self.reference + self.table / (beta or self.beta)).log_softmax(0)

    def locate(self, log_policy: Tensor) -> Point:
        """Expected reward, KL and distance to the optimum, all exact."""
        p = log_policy.exp()
        distance = (p - self.optimum().exp()).abs().sum() / 2
        return Point(float(p @ self.table), float(p @ (log_policy - self.reference)), float(distance))


@torch.no_grad()
def log_distribution(model: nn.Module) -> Tensor:
    """log π of every response."""
    padded = torch.tensor([(*r, *[EOS] * (LENGTH - len(r))) for r in responses()])
    mask = torch.tensor([[1] * (1 + len(r)) + [0] * (LENGTH - len(r)) for r in responses()])
    ids = torch.cat([torch.tensor([Toy.prompt]).expand(len(padded), 1), padded], dim=1)
    logprobs = response_outputs(model, ids, mask, LENGTH).logits.double().log_softmax(-1)
    return (logprobs.gather(-1, padded[..., None]).squeeze(-1) * mask[:, 1:]).sum(1)


class ToyPrompts(L.LightningDataModule):
    """The one prompt, over and over."""

    def take(self, n: int) -> dict:
        ids = torch.tensor([Toy.prompt]).expand(n, 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompts": [""] * n}

    def train_dataloader(self):
        return self.trainer.lightning_module.experience_dataloader(self)


def train(toy: Toy, seed: int, iterations: int = 200, callbacks: list | None = None, **options: Any) -> Point:
    """Run PPO under a plain Trainer and say where it ends; single-threaded work of some 20 seconds."""
    L.seed_everything(seed, verbose=False)
    settings = dict(
        kl_coef=toy.beta,
        rollout_batch_size=256,
        minibatch_size=64,
        num_passes=4,
        max_new_tokens=LENGTH,
        learning_rate=2e-3,
        vf_coef=0.5,
        clip_range_value=None,
        forward_batch_size=10_000,
    )
    module = PPOModule(copy.deepcopy(toy.model), toy.reward, tokenizer=LetterTokenizer(), **(settings | options))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=iterations,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(module, datamodule=ToyPrompts())
    return toy.locate(log_distribution(module.policy))


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1 + len(LETTERS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=None,  # a padding index would freeze the embedding of the prompt token at 0
        initializer_range=0.08,
    )
