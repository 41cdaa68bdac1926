"""Adapters of reward models, as `RewardModule` with LoRA exports them, without a training."""

from pathlib import Path

import torch
from conftest import make_tokenizer

from lightning_rlhf.modules.backbone import add_lora
from lightning_rlhf.modules.exporting import save_network
from lightning_rlhf.modules.scorer import Scorer


def save_reward_adapter(base: str, folder: Path, seed: int = 0, r: int = 3) -> str:
    """A folder with LoRA layers and a head that do something, and a normaliser, for the base model in a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        scorer = Scorer(add_lora(Scorer.load(base, "float32").model, r, 2 * r, "all-linear"))
        for name, parameter in scorer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        torch.nn.init.normal_(scorer.head.weight)
    scorer.set_normalizer(0.5 + seed, 2.0)
    save_network(scorer, folder, base=base)
    make_tokenizer().save_pretrained(folder)
    return str(folder)
