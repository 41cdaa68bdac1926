"""Which charts a run gets: those of the metrics that it logged."""

import math
from typing import NamedTuple

from . import charts
from .charts import Line
from .run import Columns, Run

_OWN_SECTION = ("time/", "throughput/", "memory/", "progress/", "rollout/reward/", "val/reward/", "frontier/")


class Chart(NamedTuple):
    """A drawn chart with its heading, and a short remark on it."""

    title: str
    note: str
    svg: str


class Panel(NamedTuple):
    """A chart to draw if any of its metrics was logged; `metrics` are pairs of name and label."""

    title: str
    note: str
    metrics: tuple[tuple[str, str], ...]


def _stages(name: str, train: str = "train") -> tuple[tuple[str, str], ...]:
    """The same metric in training and on held-out data."""
    return (f"{train}/{name}", {"train": "training", "rollout": "rollouts"}[train]), (f"val/{name}", "held-out")


def _pair(stage: str, name: str, *parts: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{stage}/{name}_{part}", part) for part in parts)


PANELS = (
    Panel("Reward", "mean per response", (*_stages("reward", "rollout"), ("val/reference_reward", "reference"))),
    Panel("KL to the reference", "nats per response", _stages("kl", "rollout")),
    Panel("Entropy", "nats per token", _stages("entropy", "rollout")),
    Panel("Response length", "tokens", _stages("response_length", "rollout")),
    Panel(
        "Responses that end",
        "share",
        (("rollout/eos_rate", "EOS"), ("val/eos_rate", "EOS, held-out"), ("rollout/truncated_rate", "truncated")),
    ),
    Panel("Win rate", "against the reference's responses", (("val/win_rate", "held-out"),)),
    Panel("Different n-grams", "distinct-n", (("rollout/distinct_1", "n = 1"), ("rollout/distinct_2", "n = 2"))),
    Panel("Reward–length correlation", "within a rollout", (("rollout/reward_length_correlation", "rollouts"),)),
    Panel("Groups with spread", "share", (("rollout/groups_with_spread", "rollouts"),)),
    Panel("Loss", "", _stages("loss")),
    Panel("Perplexity", "held-out", (("val/perplexity", "held-out"),)),
    Panel(
        "Agreement",
        "share of pairs ordered as people do",
        (*_stages("agreement"), ("val/agreement_length_baseline", "longer is better")),
    ),
    Panel("Accuracy", "share of pairs with a margin above 0", _stages("accuracy")),
    Panel("Margin", "", _stages("margin")),
    Panel("Implicit rewards", "training", _pair("train", "reward", "chosen", "rejected", "desirable", "undesirable")),
    Panel("Implicit rewards, held-out", "", _pair("val", "reward", "chosen", "rejected", "desirable", "undesirable")),
    Panel(
        "Log-probability of the completions",
        "nats, training",
        _pair("train", "logprob", "chosen", "rejected", "desirable", "undesirable"),
    ),
    Panel("KL per token", "held-out, nats", (("val/kl_per_token", "held-out"),)),
    Panel("Calibration error", "held-out", (("val/calibration_error", "held-out"),)),
    Panel("Correlation with ratings", "held-out", (("val/pearson", "Pearson"), ("val/spearman", "Spearman"))),
    Panel("Policy loss", "", (("policy/loss", "policy loss"),)),
    Panel("Clip fraction", "share of tokens", (("policy/clip_fraction", "policy"), ("value/clip_fraction", "value"))),
    Panel("Approximate KL of an update", "nats per token", (("policy/approx_kl", "policy"),)),
    Panel(
        "Probability ratio",
        "new / old",
        (("policy/ratio", "mean"), ("policy/ratio_min", "smallest"), ("policy/ratio_max", "largest")),
    ),
    Panel("Value loss", "", (("value/loss", "value loss"),)),
    Panel("Explained variance", "of the returns, by the value network", (("value/explained_variance", "value"),)),
    Panel(
        "Gradient norm",
        "before clipping",
        (("policy/grad_norm", "policy"), ("value/grad_norm", "value"), ("train/grad_norm", "all")),
    ),
    Panel("Coefficients", "", (("policy/kl_coef", "KL"), ("policy/entropy_coef", "entropy"))),
)


def x_label(run: Run) -> str:
    """What a run's curves are drawn over."""
    return "iteration" if run.samples_responses else "optimizer step"


def curve_charts(run: Run) -> list[Chart]:
    """The charts of the named panels, of reward components and of the learning rate."""
    panels = list(PANELS)
    panels[1:1] = component_panels(run)
    rates = tuple((name, name) for name in run.names if _is_rate(name))
    panels.append(Panel("Learning rate", "", rates))
    return [chart for panel in panels if (chart := _chart(run, panel))]


def component_panels(run: Run) -> list[Panel]:
    """One panel for each reward component that is not the reward itself."""
    names = sorted({name.split("/", 2)[2] for name in run.names if name.startswith(("rollout/reward/", "val/reward/"))})
    parts = [
        name
        for name in names
        if any(
            run.series(f"{stage}/reward/{name}") != run.series(f"{stage}/reward")
            for stage in ("rollout", "val")
            if f"{stage}/reward/{name}" in run.names
        )
    ]
    return [Panel(f"Reward: {name}", "component", _stages(f"reward/{name}", "rollout")) for name in parts]


def other_charts(run: Run) -> list[Chart]:
    """A small chart of every other metric."""
    shown = {name for panel in PANELS for name, _ in panel.metrics} | {"val/win_rate_low", "val/win_rate_high"}
    rest = [name for name in run.names if name not in shown and not name.startswith(_OWN_SECTION)]
    panels = [Panel(name, "", ((name, name),)) for name in rest if not _is_rate(name)]
    return [chart for panel in panels if (chart := _chart(run, panel))]


def frontier_chart(run: Run) -> Chart | None:
    """Reward against KL: what reward was bought with how much KL."""
    rows = [row for row in run.history if {"rollout/reward", "rollout/kl", "epoch"} <= set(row)]
    rows = [row for row in rows if math.isfinite(row["rollout/reward"]) and math.isfinite(row["rollout/kl"])]
    if not rows:
        return None
    columns = [[row[name] for row in rows] for name in ("rollout/kl", "rollout/reward", "epoch")]
    svg = charts.frontier("Reward against KL", *columns, ("KL to the reference, nats per response", "reward"))
    return Chart("Reward against KL", "rollouts; the colour tells the iteration", svg)


def distribution_charts(before: Columns | None, after: Columns | None) -> list[Chart]:
    """Rewards and lengths of the held-out responses before and after."""
    found = []
    for column, title, unit in (("reward", "Rewards", "reward"), ("length", "Lengths", "tokens")):
        parts = [("before", before or {}), ("after", after or {})]
        values = [(label, part[column]) for label, part in parts if any(map(math.isfinite, part.get(column, [])))]
        if values:
            found.append(Chart(title, "held-out responses", charts.histogram(title, values, unit)))
    return found


def reliability_chart(run: Run) -> Chart | None:
    """Whether the reward model's probabilities are what people do."""
    rows = [row for row in run.reliability if {"count", "probability", "label"} <= set(row) and row["count"] > 0]
    rows = [row for row in rows if all(math.isfinite(value) for value in row.values())]
    total = sum(row["count"] for row in rows)
    if not rows:
        return None
    error = sum(row["count"] / total * abs(row["probability"] - row["label"]) for row in rows)
    columns = [[row[name] for row in rows] for name in ("probability", "label", "count")]
    note = f"expected calibration error {error:.3f}, {total:.0f} held-out pairs"
    return Chart("Reliability", note, charts.reliability("Reliability", *columns))


def time_charts(run: Run) -> list[Chart]:
    """Where the time went, how fast it was, how much memory it took."""
    found = [phase_chart(run)]
    for title, name, note in (
        ("Throughput", "throughput/tokens_per_second", "response tokens per second"),
        ("Model FLOPs utilisation", "throughput/mfu", "share of the GPUs' peak"),
        ("Memory", "memory/peak_gib", "peak so far, GiB"),
    ):
        found.append(_chart(run, Panel(title, note, ((name, name),))))
    return [chart for chart in found if chart]


def phase_chart(run: Run) -> Chart | None:
    """Seconds of an iteration by phase, stacked."""
    phases = [name for name in ("time/rollout", "time/scoring", "time/update") if name in run.names]
    rows = [row for row in run.history if phases and set(phases) <= set(row)]
    if not rows:
        return None
    parts = [(name[5:], [row[name] for row in rows]) for name in phases]
    if all("time/iteration" in row for row in rows):
        rest = [max(0.0, row["time/iteration"] - sum(row[name] for name in phases)) for row in rows]
        parts.append(("other", rest))
    total = sum(sum(values) for _, values in parts) or 1.0
    parts = [(f"{name}, {sum(values) / total:.0%}", values) for name, values in parts]
    svg = charts.stacked("Time", [row.get("epoch", 0.0) for row in rows], parts, x_label(run), "seconds")
    return Chart("Time", "seconds of an iteration by phase", svg)


def series(run: Run, name: str) -> tuple[list[float], list[float]]:
    """A metric as `Run.series` has it; of held-out responses, if their rows were kept, with the value before training.

    Lightning logs nothing of the evaluation before training, its sanity check.
    """
    column = name.removeprefix("val/").replace("response_length", "length").replace("eos_rate", "ended")
    kept = name.startswith("val/") and all(column in columns for columns in run.evaluations.values())
    if not kept or len(run.evaluations) < 2:
        return run.series(name)
    return list(run.evaluations), [mean(columns[column]) for columns in run.evaluations.values()]


def mean(values: list[float]) -> float:
    """Mean of the finite values; NaN of none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _chart(run: Run, panel: Panel) -> Chart | None:
    logged = [(name, label) for name, label in panel.metrics if name in run.names]
    lines = [_line(run, name, label) for name, label in logged]
    if not lines:
        return None
    last = [f"last {_short(line.y[-1])}" for line in lines[:1] if len(lines) == 1]
    note = ", ".join([part for part in [panel.note] if part] + last)
    return Chart(panel.title, note, charts.curves(panel.title, lines, x_label(run)))


def _line(run: Run, name: str, label: str) -> Line:
    x, y = series(run, name)
    points = name.startswith("val/") and len(x) <= 40
    if name == "val/win_rate" and {"val/win_rate_low", "val/win_rate_high"} <= set(run.names):
        edges = [run.series(f"{name}_{edge}")[1] for edge in ("low", "high")]
        if len(edges[0]) == len(edges[1]) == len(x):
            return Line(label, x, y, points, *edges)
    return Line(label, x, y, points)


def _is_rate(name: str) -> bool:
    return name.startswith("lr-") or name.endswith(("/lr", "/learning_rate"))


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")
