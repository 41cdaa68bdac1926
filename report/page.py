"""A run's page: one HTML file that needs nothing else, made from the files in the run's folder."""

import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from . import figures, panels
from .run import Columns, Run, read_run
from .scorecard import Goal, verdict

_TEMPLATES = Path(__file__).parent / "templates"
_FIRST_FACTS = ("command", "status", "started", "seconds", "seed")


def write_report(folder: str | Path, filename: str = "report.html") -> Path:
    """Write the report of a run into its folder, whatever state the run is in.

    Args:
        folder: the run's `default_root_dir`.
        filename: name of the page.

    Returns:
        The page's path.

    Raises:
        ValueError: if the folder has none of a run's files.
    """
    run = read_run(folder)
    return write_page(run.folder / filename, "run.html.j2", page(run))


def outcome(folder: str | Path) -> str:
    """In a sentence or two: which goals a run met, and how many alarms it raised."""
    run = read_run(folder)
    goals = figures.judged(run, *figures.held_out(run))
    alarms = f"{len(run.alarms)} alarm{'s' if len(run.alarms) > 1 else ''} raised." if run.alarms else ""
    return " ".join(part for part in (verdict(goals) if goals or run.goals else "", alarms) if part)


def page(run: Run) -> dict[str, Any]:
    """What the template of a run's page shows, in the order of the page."""
    before, after = figures.held_out(run)
    goals = figures.judged(run, before, after)
    frontier = panels.frontier_chart(run)
    reliability = panels.reliability_chart(run)
    return {
        "run": run,
        "badges": badges(run, goals),
        "goals": goals,
        "verdict": verdict(goals),
        "figures": figures.key_figures(run, before, after),
        "comparison": _what_is_compared(run, before, after),
        "curves": panels.curve_charts(run),
        "spread": [*([frontier] if frontier else []), *panels.distribution_charts(before, after)],
        "reliability": reliability,
        "texts": figures.chosen_texts(before, after) or figures.rollout_texts(run),
        "times": panels.time_charts(run),
        "others": panels.other_charts(run),
        "facts": facts(run.provenance),
        "missing": missing(run),
    }


def badges(run: Run, goals: list[Goal]) -> list[tuple[str, str]]:
    """The verdict as kind ("good", "bad", "plain") and text."""
    found = []
    if goals:
        met = sum(goal.met is True for goal in goals)
        found.append(
            ("good" if met == len(goals) else "bad", f"{met} of {len(goals)} goal{'s' if len(goals) > 1 else ''} met")
        )
    if run.alarms:
        found.append(("bad", f"{len(run.alarms)} alarm{'s' if len(run.alarms) > 1 else ''} raised"))
    else:
        found.append(("plain", "no alarm raised"))
    if status := run.provenance.get("status"):
        found.append(("bad" if status == "failed" else "plain", {"running": "not finished"}.get(status, str(status))))
    return found


def facts(provenance: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """run.json as rows of name and value; what is nested gets names with dots."""
    rows: list[tuple[str, str]] = []
    names = sorted(provenance, key=lambda name: name not in _FIRST_FACTS if not prefix else False)
    for name in names:
        value = provenance[name]
        if isinstance(value, dict):
            rows += facts(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for i, item in enumerate(value):
                rows += facts(item if isinstance(item, dict) else {"": item}, f"{prefix}{name}.{i}.")
        else:
            rows.append((prefix + name, " ".join(map(str, value)) if isinstance(value, list) else _plain(value)))
    return rows


def missing(run: Run) -> list[str]:
    """A line for each part of the page that has no data, which says how to get it."""
    on_policy = run.samples_responses
    wanted = {
        "No curves: metrics.csv is missing. The CSVLogger writes it; train.py always has one.": run.history,
        "No held-out responses: validation.csv is missing. The callback ValidationSamples writes it at every "
        "validation; it needs held-out prompts.": run.evaluations or not on_policy,
        "No comparison of before and after: there is only one evaluation. Run with num_sanity_val_steps: -1, which "
        "evaluates before training, and let validation run.": len(run.evaluations) != 1,
        "No view of single tokens: the callback TokenView writes tokens/*.html.": run.token_views or not on_policy,
        "No config: config.yaml is missing. train.py writes it.": run.config,
        "No provenance: run.json is missing. The callback Provenance writes it.": run.provenance,
    }
    return [line for line, there in wanted.items() if not there]


def write_page(path: Path, template: str, content: dict[str, Any]) -> Path:
    """Fill a template and write it so that the file is at no moment half written."""
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["drawn"] = Markup  # our own charts; matplotlib escapes the text in them
    text = environment.get_template(template).render(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _what_is_compared(run: Run, before: Columns | None, after: Columns | None) -> str:
    if after is None:
        return ""
    count, total, last = len(after["prompt"]), len(run.after["prompt"]), max(run.evaluations)
    if before is None:
        differ = "" if run.before is None else " The first evaluation had other prompts: nothing can be compared."
        return f"{count} held-out prompts, after {last:g} iterations.{differ}"
    first = min(run.evaluations)
    then = "before training" if first == 0 else f"after {first:g} iterations"
    part = f"the first {count} of {total}" if count < total else f"{count}"
    line = f"{part} held-out prompts, {then} and after {last:g} iterations; paired differences with 95% intervals."
    return line[0].upper() + line[1:]


def _plain(value: Any) -> str:
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
