"""This project's side of `versus.py`: a plain Trainer, modules and data modules with their defaults."""

from typing import Any

import lightning_rlhf  # noqa: F401  first, as in train.py: it tells torch which pages to ask for

# isort: split
import lightning as L
from versus_worker import Job, Record, lower_case_share, work

from lightning_rlhf.datamodules import PreferenceDataModule, PromptDataModule, SFTDataModule
from lightning_rlhf.modules import GRPOModule, PPOModule, PreferenceModule, RewardModule, SFTModule

ON_POLICY = ("ppo", "grpo")


class IterationClock(L.Callback):
    """Records what an epoch is where an epoch is an iteration."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.record.start()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.record.count(sum(pl_module.samples["length"]))
        self.record.reward(pl_module.samples["reward"])
        self.record.lap()


class StepClock(L.Callback):
    """Records what a batch is where a batch is an iteration; the wait for it counts."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.record.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self.record.count(batch["attention_mask"].sum())
        self.record.lap()


def letters(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    """GRPO's reward."""
    return lower_case_share(responses)


def make_module(job: Job) -> L.LightningModule:
    """The module of a job."""
    options = dict(dtype="bfloat16", learning_rate=job.learning_rate, lora_r=job.lora_r, compiled_layers=job.compiled)
    if job.method in ON_POLICY:
        options |= dict(
            rollout_batch_size=job.rows,
            minibatch_size=job.minibatch,
            num_passes=job.passes,
            max_new_tokens=job.max_new_tokens,
            min_new_tokens=job.min_new_tokens,
            compiled_rollouts=job.compiled,
        )
    if job.method == "ppo":
        value_model = job.reward if job.value_network else None
        return PPOModule(job.policy, job.reward, kl_coef=0.05, value_model=value_model, **options)
    if job.method == "grpo":
        return GRPOModule(job.policy, letters, group_size=job.group_size, kl_coef=0.04, **options)
    if job.method == "reward":
        return RewardModule(job.reward, **options)
    return {"dpo": PreferenceModule, "sft": SFTModule}[job.method](job.policy, **options)


def make_data(job: Job) -> L.LightningDataModule:
    """The data of a job."""
    if job.method in ON_POLICY:
        return PromptDataModule(job.data)
    return (SFTDataModule if job.method == "sft" else PreferenceDataModule)(job.data, batch_size=job.rows)


def train(job: Job, record: Record) -> dict[str, Any]:
    """Train, and give back the last figures."""
    is_on_policy = job.method in ON_POLICY
    L.seed_everything(1)
    trainer = L.Trainer(
        accelerator=job.accelerator,
        devices=1,
        max_epochs=job.total if is_on_policy else 1,
        gradient_clip_val=None if job.method == "ppo" else 1.0,  # TRL's PPO does not clip
        callbacks=[(IterationClock if is_on_policy else StepClock)(record)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(make_module(job), make_data(job))
    return trainer.callback_metrics


if __name__ == "__main__":
    work(train, ("lightning", "lightning-rlhf"))
