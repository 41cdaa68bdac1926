"""A language small enough to list, so that where each method must end is known without training anything.

Three letters and EOS, at most three tokens: 40 responses, each with a random reward. Whatever samples, masks, shapes
rewards, estimates advantages or clips wrongly ends elsewhere. The ends are in `limits.py`.
"""

import copy
import itertools
from typing import Any, NamedTuple

import lightning as L
import torch
from limits import kl_regularised
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_rlhf.modules import PPOModule, PreferenceModule, TextModule

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
        """log π* of KL-regularised RL, over `responses()`."""
        return kl_regularised(self.reference, self.table, beta or self.beta)

    def locate(self, log_policy: Tensor, end: Tensor | None = None) -> Point:
        """Expected reward, KL and distance to where a method must end (None: `optimum`), all exact."""
        p, end = log_policy.exp(), self.optimum() if end is None else end
        return Point(
            float(p @ self.table), float(p @ (log_policy - self.reference)), float((p - end.exp()).abs().sum() / 2)
        )


def whole_sequences() -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of the prompt with every response."""
    padded = torch.tensor([(*r, *[EOS] * (LENGTH - len(r))) for r in responses()])
    mask = torch.tensor([[1] * (1 + len(r)) + [0] * (LENGTH - len(r)) for r in responses()])
    return torch.cat([torch.tensor([Toy.prompt]).expand(len(padded), 1), padded], dim=1), mask


@torch.no_grad()
def log_distribution(model: nn.Module) -> Tensor:
    """log π of every response."""
    ids, mask = whole_sequences()
    logprobs = model(ids, mask).logits[:, -LENGTH - 1 : -1].double().log_softmax(-1)
    return (logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]).sum(1)


class ToyPrompts(L.LightningDataModule):
    """The one prompt, over and over."""

    def take(self, n: int) -> dict:
        ids = torch.tensor([Toy.prompt]).expand(n, 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompts": [""] * n}

    def train_dataloader(self):
        return self.trainer.lightning_module.experience_dataloader(self)


class ToyPairs(L.LightningDataModule):
    """All pairs of responses, with the share of Bradley-Terry judges who prefer the first."""

    def __init__(self, toy: Toy, steps: int) -> None:
        super().__init__()
        first, second = torch.triu_indices(len(responses()), len(responses()), offset=1)
        ids, mask = whole_sequences()
        rows = torch.cat([first, second])
        counts = mask.bool()
        counts[:, 0] = False  # the prompt
        preference = (toy.table[first] - toy.table[second]).sigmoid().float()
        batch = {"input_ids": ids, "attention_mask": mask, "loss_mask": counts}
        self.batch = {name: value[rows] for name, value in batch.items()}
        self.batch |= {"preference": preference, "margin": torch.zeros(len(first))}
        self.steps = steps

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.batch] * self.steps, batch_size=None)


def train(
    toy: Toy,
    seed: int,
    iterations: int = 200,
    callbacks: list | None = None,
    method: type[TextModule] = PPOModule,
    **options: Any,
) -> Tensor:
    """log π over `responses()` where a method ends under a plain Trainer; single-threaded work of some 20 seconds."""
    L.seed_everything(seed, verbose=False)
    on_policy = dict(
        rollout_batch_size=256,
        minibatch_size=64,
        num_passes=4,
        max_new_tokens=LENGTH,
        learning_rate=2e-3,
        forward_batch_size=10_000,
    )
    offline = method is PreferenceModule
    settings = (dict(learning_rate=5e-3) if offline else on_policy) | options
    reward = {} if offline else {"reward": toy.reward}
    module = method(copy.deepcopy(toy.model), tokenizer=LetterTokenizer(), **reward, **settings)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1 if offline else iterations,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(module, datamodule=ToyPairs(toy, iterations) if offline else ToyPrompts())
    return log_distribution(module.policy)


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
