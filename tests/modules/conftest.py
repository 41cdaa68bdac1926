"""A policy of eight tokens, so that responses end often, a stream of prompts of unequal length, short runs of PPO."""

from collections.abc import Callable

import lightning as L
import pytest
import torch
from conftest import make_llama, make_tokenizer
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForSequenceClassification

from lightning_rlhf.modules import PPOModule

PROMPTS = ("\1", "\2\3\4\5", "\6\7", "\1\3\3", "\5", "\7\7\2")


def letters(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    """A reward in which every letter has its own worth."""
    return [sum((ord(c) * 7 % 5) - 1.5 for c in response) / 2 for response in responses]


class Prompts(L.LightningDataModule):
    """An endless stream of prompts, its place in it saved, and held-out ones."""

    def __init__(self, prompts: tuple[str, ...] = PROMPTS, validate: bool = False) -> None:
        super().__init__()
        self.prompts, self.validate, self.cursor = prompts, validate, 0

    def take(self, n: int) -> dict:
        chosen = [self.prompts[(self.cursor + i) % len(self.prompts)] for i in range(n)]
        self.cursor += n
        return self.batch(chosen)

    @staticmethod
    def batch(prompts: list[str]) -> dict:
        length = max(map(len, prompts))
        return {
            "input_ids": torch.tensor([[0] * (length - len(p)) + [ord(c) for c in p] for p in prompts]),
            "attention_mask": torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts]),
            "prompts": list(prompts),
            "columns": {"number": list(range(len(prompts)))},
        }

    def train_dataloader(self) -> DataLoader:
        return self.trainer.lightning_module.experience_dataloader(self)

    def val_dataloader(self) -> DataLoader | list:
        return DataLoader([self.batch(["\4", "\3\2\1"]), self.batch(["\6\6"])], batch_size=None)

    test_dataloader = predict_dataloader = val_dataloader

    def state_dict(self) -> dict:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict) -> None:
        self.cursor = state["cursor"]


class Gradients(L.Callback):
    """The gradients with which each optimizer step was made."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step > len(self.steps):
            named = pl_module.named_parameters()
            self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


@pytest.fixture
def gradients() -> Gradients:
    return Gradients()


@pytest.fixture
def new_gradients() -> type[Gradients]:
    return Gradients


@pytest.fixture
def new_prompts() -> type[Prompts]:
    return Prompts


@pytest.fixture
def reward_function():
    return letters


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a language model with eight tokens, of which 0 is EOS and pad."""
    folder = tmp_path_factory.mktemp("policy")
    make_llama(vocab_size=8).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def learned_positions() -> GPT2LMHeadModel:
    """A language model with learned positions: to rotary ones only distances matter, and wrong positions go unseen."""
    config = dict(vocab_size=8, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return GPT2LMHeadModel(GPT2Config(**config, initializer_range=0.3)).eval()


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a reward model over the same eight tokens, with a normaliser."""
    folder = tmp_path_factory.mktemp("reward")
    config = LlamaConfig(**make_llama(vocab_size=8).config.to_dict() | {"num_labels": 1})
    config.reward_mean, config.reward_std = 0.75, 2.5
    with torch.random.fork_rng():
        torch.manual_seed(5)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def other_policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of another language model with the same eight tokens."""
    folder = tmp_path_factory.mktemp("other_policy")
    make_llama(seed=7, vocab_size=8).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def short(policy: str):
    """A maker of on-policy modules, with settings that make short runs move."""

    def of(kind: type, **defaults: object) -> Callable[..., L.LightningModule]:
        settings = dict(
            model=policy,
            reward=letters,
            rollout_batch_size=6,
            minibatch_size=2,
            num_passes=1,
            max_new_tokens=6,
            learning_rate=1e-2,
            lr_scheduler="constant",
        )
        return lambda **options: kind(**(settings | defaults | options))

    return of


@pytest.fixture
def ppo(short):
    """A PPOModule."""
    return short(PPOModule)


@pytest.fixture
def fit(make_trainer):
    """One epoch of a module, or what `trainer` options say."""

    def run(module, data=None, ckpt_path=None, **trainer: object):
        made = make_trainer(**(dict(max_epochs=1, log_every_n_steps=1, limit_val_batches=0) | trainer))
        if isinstance(data, list):
            made.fit(module, DataLoader(data, batch_size=None), ckpt_path=ckpt_path, weights_only=True)
        else:
            made.fit(module, datamodule=data or Prompts(), ckpt_path=ckpt_path, weights_only=True)
        return module

    return run


@pytest.fixture
def moved():
    """Moves a PPO policy and its value away from where they start, so that KL and values are not 0."""

    def move(module):
        module.configure_model()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in [*module.policy.parameters(), *module.value.parameters()]:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return module

    return move


# Lightning's advice, which tests mean to ignore: loader workers, no validation data, resuming without ModelCheckpoint.
_ADVICE = (
    "ignore:.*does not have many workers",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:Checkpoint directory .* exists and is not empty",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/modules" in item.path.as_posix():
            for advice in _ADVICE:
                item.add_marker(pytest.mark.filterwarnings(advice))
