"""The LightningModules: one file is one method."""

from .. import strategies as strategies  # registers `fsdp2`
from . import lstm as lstm  # registers its models with the Auto classes of transformers
from .ppo import PPOModule
from .reward import RewardModule
from .sft import SFTModule
from .text_module import TextModule

__all__ = ["PPOModule", "RewardModule", "SFTModule", "TextModule"]
