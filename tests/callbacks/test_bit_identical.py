import lightning as L
import pytest
import torch
from datasets import Dataset

from lightning_rlhf.cli import default_callbacks
from lightning_rlhf.datamodules import PreferenceDataModule, PromptDataModule
from lightning_rlhf.modules import GRPOModule, PPOModule, PreferenceModule, RewardModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore::lightning_rlhf.callbacks.alarm.AlarmWarning"),  # runs this short are odd
]
PROMPTS = Dataset.from_list([{"prompt": text} for text in ("hello", "good", "how are", "fine,", "well", "ok then")])
PAIRS = Dataset.from_list([{"prompt": "go", "chosen": "good " * i, "rejected": "bad"} for i in range(1, 9)])
STEPS = dict(learning_rate=0.01, lr_scheduler="constant")
RL = dict(rollout_batch_size=4, minibatch_size=2, max_new_tokens=4, **STEPS)


def vowels(prompts, responses, **columns):
    return [float(sum(c in "aeiou" for c in response)) for response in responses]


MAKERS = {
    "ppo": lambda model: (PPOModule(model, vowels, **RL), PromptDataModule(PROMPTS, val_data=PROMPTS)),
    "grpo, LoRA": lambda model: (
        GRPOModule(model, vowels, group_size=2, lora_r=2, **RL),
        PromptDataModule(PROMPTS, val_data=PROMPTS),
    ),
    "reward": lambda model: (RewardModule(model, **STEPS), PreferenceDataModule(PAIRS, val_data=PAIRS, batch_size=4)),
    "dpo": lambda model: (PreferenceModule(model, **STEPS), PreferenceDataModule(PAIRS, val_data=PAIRS, batch_size=4)),
}


def test_callbacks_change_nothing(fit):
    bare, _ = fit([], max_epochs=3)
    watched, _ = fit(default_callbacks(), max_epochs=3, enable_progress_bar=True)
    assert watched.trace == bare.trace
    for name, parameter in bare.state_dict().items():
        assert torch.equal(parameter, watched.state_dict()[name]), name


@pytest.mark.parametrize("kind", MAKERS)
def test_real_modules_learn_the_same_to_the_last_bit(kind, tiny_model, tmp_path):
    def trained(callbacks, **options):
        L.seed_everything(3, verbose=False)
        module, data = MAKERS[kind](str(tiny_model))
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_model_summary=False,
            num_sanity_val_steps=-1, log_every_n_steps=1, callbacks=callbacks, default_root_dir=tmp_path, **options,
        )  # fmt: skip
        trainer.fit(module, data)
        weights = {name: p.detach() for name, p in module.named_parameters()}
        return weights, torch.rand(3), {name: float(value) for name, value in trainer.callback_metrics.items()}

    bare, draws, figures = trained([], enable_progress_bar=False)
    watched, draws_then, figures_then = trained(default_callbacks(), enable_progress_bar=True)
    assert watched.keys() == bare.keys()
    assert all(torch.equal(watched[name], value) for name, value in bare.items())
    assert torch.equal(draws, draws_then)  # no random number was drawn, or given back
    learned = {name: value for name, value in figures.items() if not name.startswith(("time/", "throughput/"))}
    assert learned == pytest.approx({name: figures_then[name] for name in learned}, nan_ok=True, rel=0, abs=0)
    assert (tmp_path / "report.html").exists()
