"""TRL's side of `versus.py`: its trainers with their defaults, but for what both sides must have in common.

Set alike: precision (weights in bfloat16, and no autocast on top), no gradient checkpointing, which TRL has on by
default, the learning rate, the loss of GRPO, and the order of given pairs and texts.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)
from versus_worker import Job, Record, lower_case_share, work

BF16 = {"dtype": "bfloat16"}


class Clock(TrainerCallback):
    """Records an iteration every so many of the trainer's steps."""

    def __init__(self, record: Record, every: int) -> None:
        self.record, self.every = record, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.record.lap()


def shared_options(job: Job, folder: str) -> dict[str, Any]:
    """Options of every trainer."""
    return dict(
        output_dir=folder,
        use_cpu=job.accelerator == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        learning_rate=job.learning_rate,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
    )


def read(job: Job) -> Dataset:
    """The rows of a job."""
    return Dataset.from_list([json.loads(line) for line in Path(job.data).read_text().splitlines()])


def network(folder: str, scalar: bool = False) -> PreTrainedModel:
    """A language model, or one with a scalar head, in bfloat16."""
    if scalar:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def ppo(job: Job, record: Record, options: dict[str, Any]) -> Trainer:
    """PPO with the value model that TRL demands.

    `per_device_train_batch_size` is the whole batch and `gradient_accumulation_steps` 1: an optimizer step per
    minibatch. With four accumulation steps for four minibatches TRL makes one step per pass, not four.
    """
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    generate = ppo_trainer.batch_generation
    tokenizer = AutoTokenizer.from_pretrained(job.policy, padding_side="left")

    def counted(model: PreTrainedModel, queries: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found, logits = generate(model, queries, *args)
        eos = None if job.min_new_tokens else tokenizer.eos_token_id
        record.count(sampled_tokens(found[:, queries.shape[1] :], eos))
        return found, logits

    ppo_trainer.batch_generation = counted
    config = PPOConfig(
        **options,
        per_device_train_batch_size=job.rows,
        gradient_accumulation_steps=1,
        num_mini_batches=job.rows // job.minibatch,
        num_ppo_epochs=job.passes,
        total_episodes=job.rows * job.total,
        response_length=job.max_new_tokens,
        stop_token=None if job.min_new_tokens else "eos",  # without one no response ends early
        local_rollout_forward_batch_size=job.rows,
        num_sample_generations=0,
        temperature=1.0,
        kl_coef=0.05,
    )
    return PPOTrainer(
        config,
        tokenizer,
        network(job.policy),
        network(job.policy),
        reward_model=network(job.reward, scalar=True),
        value_model=network(job.reward, scalar=True),
        train_dataset=read(job).map(lambda row: tokenizer(row["prompt"]), remove_columns="prompt"),
    )


def sampled_tokens(responses: torch.Tensor, eos: int | None) -> int:
    """Tokens of the responses (B, T) up to their EOS, inclusive; all of them where `eos` is None."""
    if eos is None:
        return responses.numel()
    ended_before = (responses == eos).cumsum(1).cumsum(1) > 1
    return int((~ended_before).sum())


def grpo(job: Job, record: Record, options: dict[str, Any]) -> Trainer:
    """GRPO, its completions used for several passes."""
    from trl import GRPOConfig, GRPOTrainer

    def letters(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        record.count(sum(map(len, completion_ids)))
        rewards = lower_case_share(completions)
        record.reward(rewards)
        return rewards

    config = GRPOConfig(
        **options,
        model_init_kwargs=BF16,
        per_device_train_batch_size=job.minibatch,
        gradient_accumulation_steps=1,
        steps_per_generation=job.rows // job.minibatch,
        num_generations=job.group_size,
        num_iterations=job.passes,
        max_steps=job.steps * job.total,
        max_completion_length=job.max_new_tokens,
        generation_kwargs={"min_new_tokens": job.min_new_tokens},
        beta=0.04,
        loss_type="grpo",
    )
    return GRPOTrainer(job.policy, letters, config, read(job))


def given(job: Job, options: dict[str, Any]) -> dict[str, Any]:
    """Options of the trainers that learn from given texts, a step to each batch, in the order of the file."""
    return options | dict(
        per_device_train_batch_size=job.rows,
        max_steps=job.total,
        model_init_kwargs=BF16,
        train_sampling_strategy="sequential",
    )


def dpo(job: Job, record: Record, options: dict[str, Any]) -> Trainer:
    """DPO with its reference in memory."""
    from trl import DPOConfig, DPOTrainer

    return counting(DPOTrainer(job.policy, args=DPOConfig(**given(job, options)), train_dataset=read(job)), record)


def reward(job: Job, record: Record, options: dict[str, Any]) -> Trainer:
    """A reward model."""
    from trl import RewardConfig, RewardTrainer

    config = RewardConfig(**given(job, options))
    return counting(RewardTrainer(job.reward, args=config, train_dataset=read(job)), record)


def sft(job: Job, record: Record, options: dict[str, Any]) -> Trainer:
    """SFT without packing."""
    from trl import SFTConfig, SFTTrainer

    return counting(SFTTrainer(job.policy, args=SFTConfig(**given(job, options)), train_dataset=read(job)), record)


def counting(trainer: Trainer, record: Record) -> Trainer:
    """The trainer, with its batches' tokens recorded."""
    step = trainer.training_step

    def counted(model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        record.count(inputs["attention_mask"].sum())
        return step(model, inputs, *args)

    trainer.training_step = counted
    return trainer


def train(job: Job, record: Record) -> dict[str, Any]:
    """Train, and give back the last figures."""
    methods = {"ppo": ppo, "grpo": grpo, "dpo": dpo, "reward": reward, "sft": sft}
    with tempfile.TemporaryDirectory() as folder:
        trainer = methods[job.method](job, record, shared_options(job, folder))
        # A step of TRL's PPO is an iteration, one of its GRPO a minibatch.
        trainer.add_callback(Clock(record, every=1 if job.method == "ppo" else job.steps))
        trainer.train()
        return next(logged for logged in reversed(trainer.state.log_history) if "train_runtime" not in logged)


if __name__ == "__main__":
    work(train, ("trl", "accelerate"))
