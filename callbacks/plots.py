"""The plots of the PPO report: a figure from plain lists, no trainer, no pyplot state, no display."""

from pathlib import Path
from typing import TYPE_CHECKING

from ._shared import Columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_REWARD, _KL, _BEFORE, _GREY = "#1f6f8b", "#c8553d", "#9aa5b1", "#555555"
_DPI = 150

History = list[dict[str, float]]


def plot_training(history: History, baseline: float | None = None) -> "Figure":
    """Reward and KL over the iterations: two panels over one x-axis."""
    figure = _figure(7, 5)
    reward, kl = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _curves(reward, history, "reward", _REWARD)
    if baseline is not None:
        reward.axhline(baseline, color=_GREY, linestyle="--", linewidth=1, label="held-out prompts, before")
    reward.set_ylabel("mean reward")
    _legend(reward)
    _curves(kl, history, "kl", _KL)
    kl.set_ylabel("mean sequence KL (nats)")
    kl.set_ylim(bottom=min(0.0, kl.get_ylim()[0]))
    kl.set_xlabel("iteration")
    kl.xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels()
    return figure


def plot_frontier(history: History) -> "Figure":
    """What reward was bought with how much KL: one point per iteration, its colour the time."""
    figure = _figure(6, 4.2)
    axes = figure.subplots()
    rows = [row for row in history if "rollout/reward" in row and "rollout/kl" in row]
    kl, reward = [row["rollout/kl"] for row in rows], [row["rollout/reward"] for row in rows]
    points = axes.scatter(kl, reward, c=[row["iteration"] for row in rows], cmap="viridis", s=28)
    bar = figure.colorbar(points, ax=axes, label="iteration")
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    bar.outline.set_visible(False)
    axes.set_xlabel("mean sequence KL to the reference (nats)")
    axes.set_ylabel("mean reward of the rollout")
    return figure


def plot_rewards(before: Columns | None, after: Columns) -> "Figure":
    """Histograms of the held-out rewards before and after, over the same bins."""
    import numpy as np

    figure = _figure(6, 3.6)
    axes = figure.subplots()
    parts = [("after", after["reward"], _REWARD)]
    if before is not None:
        parts.insert(0, ("before", before["reward"], _BEFORE))
    everything = np.concatenate([np.asarray(rewards, dtype=float) for _, rewards, _ in parts])
    bins = np.histogram_bin_edges(everything, bins=min(30, max(8, len(after["reward"]) // 6)))
    for name, rewards, colour in parts:
        mean = float(np.mean(rewards))
        axes.hist(rewards, bins, color=colour, alpha=0.6, label=f"{name} (mean {mean:.2f})")
        axes.axvline(mean, color=colour, linewidth=1.5)
    axes.set_xlabel("reward")
    axes.set_ylabel("held-out prompts")
    axes.yaxis.get_major_locator().set_params(integer=True)
    _legend(axes)
    return figure


def save_plots(folder: Path, before: Columns | None, after: Columns | None, history: History) -> list[tuple[str, Path]]:
    """Draw what there is data for; returns captions and files."""
    figures = []
    if any("rollout/reward" in row for row in history):
        baseline = sum(before["reward"]) / len(before["reward"]) if before else None
        figures.append(("Reward and KL over the iterations", "training.png", plot_training(history, baseline)))
    if any("rollout/reward" in row and "rollout/kl" in row for row in history):
        figures.append(("Reward against KL", "frontier.png", plot_frontier(history)))
    if after:
        figures.append(("Rewards of the held-out prompts", "rewards.png", plot_rewards(before, after)))
    folder.mkdir(parents=True, exist_ok=True)
    for _, name, figure in figures:
        _tidy(figure).savefig(folder / name, dpi=_DPI)
    return [(caption, folder / name) for caption, name, _ in figures]


def _curves(axes: "Axes", history: History, name: str, colour: str) -> None:
    rollouts = {"label": "rollouts", "alpha": 0.45, "linewidth": 1.3, "marker": ".", "markersize": 4}
    held_out = {"label": "held-out prompts", "linewidth": 1.6, "marker": "D", "markerfacecolor": "white"}
    for stage, style in (("rollout", rollouts), ("val", held_out)):
        key = f"{stage}/{name}"
        points = [(row["iteration"], row[key]) for row in history if key in row]
        if points:
            size = {"markersize": 4.5 if len(points) <= 30 else 0} if stage == "val" else {}
            axes.plot(*zip(*points, strict=True), color=colour, **style, **size)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _legend(axes: "Axes") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def _tidy(figure: "Figure") -> "Figure":
    for axes in (each for each in figure.axes if each.get_label() != "<colorbar>"):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
    return figure
