"""DataModules: from a file, a hub id or a `datasets` object to padded batches.

`SFTDataModule` (text to imitate), `PreferenceDataModule` (chosen against rejected), `UnpairedDataModule` (answers that
are good or bad), `RatingDataModule` (texts that people rated), `RankingDataModule` (lists that people put in order) and
`PromptDataModule` (prompts for on-policy RL) share `TextDataModule`: reading, splits, loaders. What is done to a row
stands in plain functions: `sources.py` reads, `text.py` renders, tokenises and pads, `vader.py` fetches the default
data set of human ratings.
"""

from .base import TextDataModule
from .preferences import PreferenceDataModule
from .prompts import PromptDataModule
from .rankings import RankingDataModule
from .ratings import RatingDataModule
from .sft import SFTDataModule
from .unpaired import UnpairedDataModule

__all__ = [
    "PreferenceDataModule",
    "PromptDataModule",
    "RankingDataModule",
    "RatingDataModule",
    "SFTDataModule",
    "TextDataModule",
    "UnpairedDataModule",
]
