"""The LightningModules: one file is one method."""

from .ppo import PPOModule
from .reward import RewardModule
from .sft import SFTModule
from .text_module import TextModule

__all__ = ["PPOModule", "RewardModule", "SFTModule", "TextModule"]
