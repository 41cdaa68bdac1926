"""Several runs on one page: runs that differ in their seed alone form a group, shown as its mean with a band."""

import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import yaml

from . import charts, panels
from .charts import Line
from .figures import duration, run_seconds, shown, win_rate
from .page import write_page, write_report
from .panels import Chart, component_panels
from .run import Run, is_run, read_run

_SEED = re.compile(r"[-_.](?:seed[-_=]?|s)?\d+$")
_OWN = ("seed", "seed_everything", "default_root_dir", "dirpath", "save_dir", "logger", "ckpt_path")
_HELD_OUT = {"reward": "reward", "kl": "KL, nats", "length": "length", "ended": "responses that end"}
_LAST = {
    "rollout/reward": "rollout reward",
    "rollout/kl": "rollout KL, nats",
    "val/loss": "held-out loss",
    "val/perplexity": "perplexity",
    "val/agreement": "agreement",
    "val/accuracy": "accuracy",
    "val/margin": "margin",
    "val/calibration_error": "calibration error",
    "train/loss": "training loss",
}


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    label: str
    runs: list[Run]


class Table(NamedTuple):
    """Names of the columns; rows of label, number of runs, and cells."""

    names: list[str]
    rows: list[tuple[str, int, list[str]]]


def main_report(folders: list[str], output: str | None = None) -> Path:
    """Make the report of a run, or the reports and the comparison of several; prints where the page is.

    Args:
        folders: folders of runs, or folders that hold such folders.
        output: where to write the page. By default `report.html` in the folder of the only run, or `comparison.html` in
            the folder that holds the runs.

    Returns:
        The page's path.

    Raises:
        ValueError: if a folder is not one of a run and holds none.
    """
    found = find_runs(folders)
    reports = [write_report(folder) for folder in found]
    if len(found) == 1 and is_run(Path(folders[0])):
        path = reports[0] if output is None else write_report(found[0], os.path.relpath(output, found[0]))
    else:
        common = Path(os.path.commonpath([folder.resolve() for folder in found]))
        inside = common.parent if len(found) == 1 else common
        path = write_comparison(found, Path(output) if output else inside / "comparison.html")
    print(f"Report: {path}")
    return path


def find_runs(folders: list[str]) -> list[Path]:
    """The folders of runs among the given ones and those directly inside them."""
    found = []
    for folder in map(Path, folders):
        inside = [folder] if is_run(folder) else sorted(path for path in folder.glob("*") if is_run(path))
        if not inside:
            raise ValueError(f"`folders` must be runs or hold runs, but {folder} is none and holds none.")
        found += inside
    return list(dict.fromkeys(found))


def write_comparison(folders: list[str | Path], output: str | Path) -> Path:
    """Compare runs on one page.

    Args:
        folders: folders of runs.
        output: path of the page to write.

    Returns:
        The page's path.

    Raises:
        ValueError: if there is no folder, or one has none of a run's files.
    """
    if not folders:
        raise ValueError("`folders` must name at least one run, but is empty.")
    output, groups = Path(output), grouped([read_run(folder) for folder in folders])
    content = {
        "title": f"{output.resolve().parent.name}: comparison",
        "groups": groups,
        "run_count": len(folders),
        "table": final_table(groups),
        "curves": comparison_charts(groups),
        "differences": config_differences(groups),
        "runs": [_row(group, run, output) for group in groups for run in group.runs],
    }
    return write_page(output, "comparison.html.j2", content)


def grouped(runs: list[Run]) -> list[Group]:
    """Groups of runs with equal configs but for seeds and folders; without configs, of names but for the seed's suffix.

    A run without a config joins those of its name.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        config, stem = _comparable(run), _SEED.sub("", run.name)
        match = next((key for key in groups if (key[1] == config if config and key[1] else key[0] == stem)), None)
        groups.setdefault(match or (stem, config), []).append(run)
    stems = [stem for stem, _ in groups]
    labels = [stem if stems.count(stem) == 1 else members[0].name for (stem, _), members in groups.items()]
    return [Group(label, members) for label, members in zip(labels, groups.values(), strict=True)]


def final_table(groups: list[Group]) -> Table:
    """Mean ± standard deviation over a group's runs of each final figure that some run has."""
    finals = [[final_figures(run) for run in group.runs] for group in groups]
    names = list(dict.fromkeys(name for runs in finals for figures in runs for name in figures))
    rows = []
    for group, runs in zip(groups, finals, strict=True):
        columns = [[figures[name] for figures in runs if name in figures] for name in names]
        cells = [
            mean_and_sd(column, duration if name == "time" else shown)
            for name, column in zip(names, columns, strict=True)
        ]
        rows.append((group.label, len(group.runs), cells))
    return Table(names, rows)


def final_figures(run: Run) -> dict[str, float]:
    """What a run ended with: held-out means, or the last values that were logged; and what it cost."""
    figures = {}
    if after := run.after:
        parts = [name for name in after if name.startswith("reward/") and after[name] != after.get("reward")]
        titles = _HELD_OUT | {name: name.removeprefix("reward/") for name in parts}
        figures = {titles[name]: panels.mean(after[name]) for name in titles if name in after}
    if won := win_rate(run):
        figures["win rate"] = won[0]
    for name, title in _LAST.items():
        if (ends := run.first_and_last(name)) and not (after and name.startswith("rollout/")):
            figures[title] = ends[1]
    if (seconds := run_seconds(run)) is not None:
        figures["time"] = seconds
    return figures


def mean_and_sd(values: list[float], style: Any = shown) -> str:
    """Mean ± standard deviation (n − 1); the mean alone of one run, a dash of none, NaN if one is."""
    if not values:
        return "–"
    if not all(map(math.isfinite, values)):
        return "NaN"
    mean = sum(values) / len(values)
    return style(mean) if len(values) < 2 else f"{style(mean)} ± {style(float(np.std(values, ddof=1)))}"


def comparison_charts(groups: list[Group]) -> list[Chart]:
    """Reward against KL, and the curves of the metrics that the runs' pages show."""
    found = []
    clouds = [cloud for i, group in enumerate(groups) if (cloud := _cloud(group, i)).x]
    if clouds:
        axes = ("KL to the reference, nats per response", "reward")
        svg = charts.clouds("Reward against KL", clouds, axes)
        found.append(Chart("Reward against KL", "rollouts of all runs, a point per iteration", svg))
    components = dict.fromkeys(panel for group in groups for run in group.runs for panel in component_panels(run))
    for panel in (panels.PANELS[0], *components, *panels.PANELS[1:]):
        for name, label in panel.metrics:
            lines = [line for i, group in enumerate(groups) if (line := band(group, name, i)) and line.x]
            if lines:
                title = panel.title if len(panel.metrics) == 1 else f"{panel.title}, {label}"
                axis = next(panels.x_label(run) for group in groups for run in group.runs if name in run.names)
                found.append(Chart(title, panel.note, charts.curves(title, lines, axis)))
    return found


def band(group: Group, name: str, colour: int | None = None) -> Line | None:
    """A metric's mean over a group's runs and the band from smallest to largest; None if no run logged it.

    Where half of the runs or more have no value, because they are shorter, there is none.
    """
    runs = [dict(zip(*panels.series(run, name), strict=True)) for run in group.runs if name in run.names]
    if not runs:
        return None
    columns = {x: [run[x] for run in runs if x in run] for x in sorted(set().union(*runs))}
    columns = {x: column for x, column in columns.items() if 2 * len(column) > len(runs)}
    means = [sum(column) / len(column) for column in columns.values()]
    low, high = [min(column) for column in columns.values()], [max(column) for column in columns.values()]
    edges = (low, high) if len(runs) > 1 else (None, None)
    return Line(group.label, list(columns), means, name.startswith("val/") and len(means) <= 40, *edges, colour)


def config_differences(groups: list[Group]) -> list[tuple[str, list[str]]]:
    """Settings in which the groups' first configs differ, with their values; a dash where there is none."""
    flat = [_flat(_config(group.runs[0])) for group in groups]
    names = dict.fromkeys(name for each in flat for name in each if not _is_own(name))
    known = [each for each in flat if each]
    differ = [name for name in names if len({str(each.get(name, "–")) for each in known}) > 1]
    return [(name, [str(each.get(name, "–")) for each in flat]) for name in differ]


def _cloud(group: Group, colour: int) -> Line:
    rows = [row for run in group.runs for row in run.history if {"rollout/reward", "rollout/kl"} <= set(row)]
    rows = [row for row in rows if math.isfinite(row["rollout/reward"] + row["rollout/kl"])]
    kl, reward = [row["rollout/kl"] for row in rows], [row["rollout/reward"] for row in rows]
    return Line(group.label, kl, reward, colour=colour)


def _row(group: Group, run: Run, output: Path) -> dict[str, str]:
    page, folder = run.folder / "report.html", os.path.relpath(run.folder, output.parent)
    link = quote(Path(os.path.relpath(page, output.parent)).as_posix()) if page.exists() else ""
    return {"group": group.label, "name": run.name, "alarms": str(len(run.alarms)), "folder": folder, "report": link}


def _config(run: Run) -> Any:
    try:
        return yaml.safe_load(run.config)
    except yaml.YAMLError:
        return None


def _comparable(run: Run) -> str:
    """The config as text without seeds and folders, and without the run's seed in paths; "" without a config."""
    suffix = _SEED.search(run.name)
    flat = {name: value for name, value in _flat(_config(run)).items() if not _is_own(name)}
    text = repr(sorted((name, str(value)) for name, value in flat.items())) if flat else ""
    return re.sub(re.escape(suffix[0]) + r"(?=/)", "", text) if suffix else text


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in _flat(part, f"{prefix}{name}.").items()}
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return _flat({str(i): part for i, part in enumerate(value)}, prefix)
    return {prefix[:-1]: value} if prefix else {}


def _is_own(name: str) -> bool:
    return any(part in _OWN for part in name.split("."))
