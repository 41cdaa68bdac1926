"""The PPO report as Markdown. Pure functions: no trainer, no files."""

import re

from ._shared import Columns
from .scorecard import Goal, verdict

_NO_BASELINE = (
    "**There is no baseline.** The held-out prompts were not evaluated before training, so nothing can be compared "
    "with it. Run with `num_sanity_val_steps: -1`."
)
_NO_SAMPLES = "**There are no held-out samples.** Validation never ran, so no goal can be judged."


def render(
    goals: list[Goal],
    before: Columns | None,
    after: Columns | None,
    figures: list[tuple[str, str]],
    facts: dict[str, str],
    prompts_in_table: int,
) -> str:
    """The whole report.

    Args:
        goals: judged goals, in the order shown.
        before: samples of the held-out prompts before training, None without a baseline.
        after: samples of the same prompts after training, None if there was no validation.
        figures: captions and paths relative to the report.
        facts: what to say about the run, by name.
        prompts_in_table: how many prompts to show.
    """
    parts = ["# PPO report"]
    parts += [f"**{verdict(goals)}**", _goal_table(goals)] if after else [_NO_SAMPLES]
    if after and before is None:
        parts.insert(2, _NO_BASELINE)
    elif after and len(before["prompt"]) < int(facts.get("held-out prompts", 0)):
        parts.insert(
            2,
            f"The baseline covers only {len(before['prompt'])} of the held-out prompts; before and after are "
            "compared on these. Run with `num_sanity_val_steps: -1` to compare all.",
        )
    parts += [f"## {caption}\n\n![{caption}]({path})" for caption, path in figures]
    if after:
        parts += ["## Texts", _text_table(before, after, prompts_in_table)]
    parts += ["## The run", _table(["", ""], [[name, value] for name, value in facts.items()])]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text that stays inside one cell of a Markdown table and is shown as it is."""
    text = re.sub(r"([\\|`*_<>\[\]])", r"\\\1", text.strip())
    return re.sub(r"\s*\n\s*", " ⏎ ", text)


def _goal_table(goals: list[Goal]) -> str:
    met = {True: "yes", False: "**no**", None: "not judged"}
    rows = [[goal.name, goal.before, goal.after, goal.change, goal.goal, met[goal.met]] for goal in goals]
    return _table(["what", "before", "after", "change", "goal", "met"], rows)


def _text_table(before: Columns | None, after: Columns, count: int) -> str:
    rows = []
    for i in range(min(count, len(after["prompt"]))):
        old = [escape(before["response"][i]), f"{before['reward'][i]:.2f}"] if before else ["–", "–"]
        new = [escape(after["response"][i]), f"{after['reward'][i]:.2f}"]
        rows.append([escape(after["prompt"][i]), old[0], new[0], old[1], new[1]])
    return _table(["prompt", "response before", "response after", "reward before", "reward after"], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
