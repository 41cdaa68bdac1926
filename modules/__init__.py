"""The LightningModules: one file is one method."""

from .. import strategies as strategies  # registers `fsdp2`
from . import lstm as lstm  # registers its models with the Auto classes of transformers
from .grpo import GRPOModule
from .kto import KTOModule
from .online_dpo import OnlineDPOModule
from .ppo import PPOModule
from .preference import PreferenceModule
from .rejection import BestOfNModule, RFTModule
from .reward import RewardModule
from .sft import SFTModule
from .text_module import TextModule

__all__ = [
    "BestOfNModule",
    "GRPOModule",
    "KTOModule",
    "OnlineDPOModule",
    "PPOModule",
    "PreferenceModule",
    "RFTModule",
    "RewardModule",
    "SFTModule",
    "TextModule",
]
