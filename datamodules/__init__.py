"""DataModules: from a file, a hub id or a `datasets` object to padded batches.

`SFTDataModule` (text to imitate), `PreferenceDataModule` (chosen against rejected), `RatingDataModule` (texts that
people rated) and `PromptDataModule` (prompts for on-policy RL) share `TextDataModule`: reading, splits, loaders. What
is done to a row stands in plain functions: `sources.py` reads, `text.py` renders, tokenises and pads, `vader.py`
fetches the default data set of human ratings.
"""

from .base import TextDataModule
from .preferences import PreferenceDataModule
from .prompts import PromptDataModule
from .ratings import RatingDataModule
from .sft import SFTDataModule

__all__ = ["PreferenceDataModule", "PromptDataModule", "RatingDataModule", "SFTDataModule", "TextDataModule"]
