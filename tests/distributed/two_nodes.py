"""Trains an LSTM by PPO, as the only process or as one of several nodes; `test_two_nodes.py` runs it both ways.

    python two_nodes.py MODEL_FOLDER RESULT_FOLDER
    torchrun --nnodes 2 --nproc-per-node 1 --node-rank 0 --master-addr ... two_nodes.py MODEL_FOLDER RESULT_FOLDER

An iteration has `ROLLOUT` responses and updates of `MINIBATCH` each, shared out over the nodes.
"""

import faulthandler
import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_tokenizer

from lightning_rlhf.datamodules import PromptDataModule
from lightning_rlhf.modules import PPOModule

ROLLOUT, MINIBATCH, ITERATIONS = 12, 4, 3
PROMPTS = ("\1", "\2\3\4\5", "\6\7", "\1\3\3", "\5", "\7\7\2", "\4\4", "\2", "\3\5\6\1\2")


def sevens(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    """Reward of every 7; less of it the longer the prompt, so that it matters which response met which prompt."""
    return [response.count("\7") - 0.1 * len(prompt) for prompt, response in zip(prompts, responses, strict=True)]


class Recorder(L.Callback):
    """What this process saw in each iteration."""

    def __init__(self) -> None:
        self.samples: list[dict[str, list]] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: PPOModule) -> None:
        self.samples.append({name: pl_module.samples[name] for name in ("prompt", "response", "reward")})

    def on_train_end(self, trainer: L.Trainer, pl_module: PPOModule) -> None:
        clocks = ("time/", "throughput/")
        self.metrics.append({k: v.item() for k, v in trainer.callback_metrics.items() if not k.startswith(clocks)})


def train(model: str, nodes: int) -> tuple[PPOModule, Recorder]:
    L.seed_everything(3)
    module = PPOModule(
        model,
        reward=sevens,
        rollout_batch_size=ROLLOUT // nodes,
        minibatch_size=MINIBATCH // nodes,
        num_passes=2,
        max_new_tokens=6,
        kl_coef=0.02,
        learning_rate=3e-2,
        lr_scheduler="constant",
        adam_eps=1e-3,  # a smaller one would blow up the rounding of gradients near 0
    )
    data = PromptDataModule(Dataset.from_dict({"prompt": PROMPTS}), tokenizer=make_tokenizer())
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=nodes,
        strategy="ddp" if nodes > 1 else "auto",
        max_epochs=ITERATIONS,
        gradient_clip_val=1.0,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=data)
    return module, recorder


def main(model: str, results: Path) -> None:
    """Leaves `RANK.json` and `RANK.pt`, the trained weights."""
    module, recorder = train(model, int(os.environ.get("WORLD_SIZE", "1")))
    rank = module.global_rank
    weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    torch.save(weights, results / f"{rank}.pt")
    (results / f"{rank}.json").write_text(json.dumps({"samples": recorder.samples, "metrics": recorder.metrics[0]}))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100, exit=True)  # a node whose peer is gone waits for ever
    main(sys.argv[1], Path(sys.argv[2]))
