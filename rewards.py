"""Ready-made reward functions: `f(prompts, responses, **columns) -> list of floats`."""

from functools import cache
from typing import Any


def vader_compound(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """Rule-based sentiment of prompt + response, from -1 to 1 (Hutto & Gilbert 2014); needs `vaderSentiment`."""
    return [_analyzer().polarity_scores(p + r)["compound"] for p, r in zip(prompts, responses, strict=True)]


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
