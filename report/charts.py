"""Charts as SVG text, drawn by matplotlib in stand-in colours that become CSS variables: a chart follows the theme."""

import hashlib
import io
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, SURFACE = "#010203", "#010204", "#010205", "#010206"
SERIES = tuple(f"#01030{i}" for i in range(6))
SCALE = tuple(f"#01040{i}" for i in range(8))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface"}
_VARIABLES |= {colour: f"series-{i}" for i, colour in enumerate(SERIES)}
_VARIABLES |= {colour: f"scale-{i}" for i, colour in enumerate(SCALE)}

_SIZE = (4.4, 2.5)  # inches: about 320 CSS pixels wide, so that a phone shows the text in its own size
_MOST_POINTS = 300
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning-rlhf",  # the same data give the same file
    "text.parse_math": False,  # a "$" in a metric's name is a dollar
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.4,
    "legend.borderaxespad": 0.0,
    "legend.labelcolor": MUTED,
}


class Line(NamedTuple):
    """A curve of a chart.

    Args:
        label: its name in the legend.
        x: where.
        y: values; NaN leaves a gap.
        points: draw a mark at each value, as few evaluations need it.
        low: lower edge of a band around the curve.
        high: its upper edge.
        colour: number of its colour; by default its place among the lines. Lines with one always have a legend.
    """

    label: str
    x: list[float]
    y: list[float]
    points: bool = False
    low: list[float] | None = None
    high: list[float] | None = None
    colour: int | None = None


def curves(title: str, lines: list[Line], x_label: str) -> str:
    """Several curves over one axis."""

    def paint(axes: "Axes") -> None:
        for i, line in enumerate(map(thinned, lines)):
            colour, style = _colour(i if line.colour is None else line.colour)
            marks = {"marker": "o", "markersize": 4} if line.points or len(line.x) == 1 else {}
            width = 1.7 if len(lines) < 3 else 1.4
            axes.plot(line.x, line.y, color=colour, linestyle=style, linewidth=width, label=line.label, **marks)
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
        axes.set_xlabel(x_label)
        _whole_numbers(axes)

    return _draw(title, paint, legend=len(lines) > 1 or lines[0].colour is not None)


def thinned(line: Line) -> Line:
    """A long curve as means of neighbours, with a band from their smallest to their largest value."""
    if len(line.x) <= _MOST_POINTS or line.low is not None:
        return line
    x, y = np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float)
    parts = [part for part in np.array_split(np.arange(len(x)), _MOST_POINTS) if np.isfinite(y[part]).any()]
    edges = [(x[p].mean(), np.nanmean(y[p]), np.nanmin(y[p]), np.nanmax(y[p])) for p in parts]
    x, y, low, high = (list(map(float, column)) for column in zip(*edges, strict=True)) if edges else ([],) * 4
    return Line(line.label, x, y, False, low, high, line.colour)


def frontier(title: str, x: list[float], y: list[float], iterations: list[float], labels: tuple[str, str]) -> str:
    """Points whose colour tells the iteration, such as reward against KL."""

    def paint(axes: "Axes") -> None:
        from matplotlib.colors import ListedColormap

        axes.plot(x, y, color=GRID, linewidth=1, zorder=1)
        points = axes.scatter(x, y, c=iterations, cmap=ListedColormap(SCALE), s=20, linewidths=0, zorder=2)
        bar = axes.figure.colorbar(points, ax=axes, pad=0.03, aspect=28)
        bar.set_label("iteration", color=MUTED)
        bar.outline.set_visible(False)
        bar.ax.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])

    return _draw(title, paint, right=1.02)


def clouds(title: str, groups: list[Line], labels: tuple[str, str]) -> str:
    """Points of several groups of runs, each in its colour."""

    def paint(axes: "Axes") -> None:
        for i, group in enumerate(groups):
            colour, _ = _colour(i if group.colour is None else group.colour)
            axes.scatter(group.x, group.y, color=colour, s=13, linewidths=0, alpha=0.75, label=group.label)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])

    return _draw(title, paint, legend=True)


def histogram(title: str, parts: list[tuple[str, list[float]]], x_label: str) -> str:
    """Distributions over the same bins, with a line at each mean."""
    finite = [(label, [value for value in values if math.isfinite(value)]) for label, values in parts]
    everything = np.asarray([value for _, values in finite for value in values], dtype=float)
    count = max(len(values) for _, values in finite)

    def paint(axes: "Axes") -> None:
        bins = np.histogram_bin_edges(everything, bins=min(30, max(8, count // 6)))
        colours = [MUTED, SERIES[0]] if len(finite) == 2 else [SERIES[0]]
        for colour, (label, values) in zip(colours, finite, strict=True):
            if values:
                mean = sum(values) / len(values)
                axes.hist(values, bins, color=colour, alpha=0.45, label=f"{label}, mean {mean:.3g}")
                axes.axvline(mean, color=colour, linewidth=1.6)
        axes.set_xlabel(x_label)
        axes.set_ylabel("responses")
        axes.yaxis.get_major_locator().set_params(integer=True)

    return _draw(title, paint, legend=True)


def stacked(title: str, x: list[float], parts: list[tuple[str, list[float]]], x_label: str, y_label: str) -> str:
    """Parts of a whole, one upon the other."""

    def paint(axes: "Axes") -> None:
        colours = [*SERIES[: len(parts) - 1], GRID] if parts[-1][0].startswith("other") else list(SERIES[: len(parts)])
        if len(x) > 1:
            axes.stackplot(
                x, [v for _, v in parts], labels=[label for label, _ in parts], colors=colours, alpha=0.8, linewidth=0
            )
        else:
            bottom = 0.0
            for colour, (label, values) in zip(colours, parts, strict=True):
                axes.bar(x, values, 0.5, bottom, color=colour, alpha=0.8, label=label)
                bottom += values[0]
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _whole_numbers(axes)

    return _draw(title, paint, legend=True)


def reliability(title: str, probability: list[float], label: list[float], count: list[float]) -> str:
    """What happened against what was predicted; the size of a point tells how many pairs it stands for."""

    def paint(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="perfectly calibrated")
        most = max(count, default=1) or 1
        axes.plot(probability, label, color=SERIES[0], linewidth=1.2, alpha=0.5)
        sizes = [10 + 90 * n / most for n in count]
        axes.scatter(probability, label, s=sizes, color=SERIES[0], linewidths=0, label="this model")
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("share of people")
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)

    return _draw(title, paint, legend=True)


def _colour(i: int) -> tuple[str, str]:
    """Colour and line style: beyond the colours, the styles change."""
    return SERIES[i % len(SERIES)], ("-", "--", ":", "-.")[i // len(SERIES) % 4]


def _whole_numbers(axes: "Axes") -> None:
    low, high = axes.get_xlim()
    if high - low >= 2:
        axes.xaxis.get_major_locator().set_params(integer=True)


def _draw(title: str, paint: Callable[["Axes"], None], legend: bool = False, right: float = 0.975) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with rc_context(_STYLE):
        figure = Figure(figsize=_SIZE)
        axes = figure.subplots()
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        paint(axes)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
        figure.subplots_adjust(left=0.165 if axes.get_ylabel() else 0.13, right=right, bottom=0.19, top=0.97)
        if legend:
            rows = _legend(axes)
            figure.subplots_adjust(top=0.97 - 0.085 * rows)
        return _svg(figure, title)


def _legend(axes: "Axes") -> int:
    """A legend above the plot, where it hides nothing; returns its number of rows."""
    labels = axes.get_legend_handles_labels()[1]
    wide = max(map(len, labels), default=0)
    columns = max(1, min(len(labels), 46 // (wide + 4)))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=columns, columnspacing=1.2, handletextpad=0.5)
    return math.ceil(len(labels) / columns)


def _svg(figure: "Figure", title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", text, flags=re.S)
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r'(?<= )(d|x|y|transform)="([^"]*)"', _rounded, body)
    body = re.sub(r'font-family: [^;"]+;? ?', "", body)  # the page's
    prefix = "g" + hashlib.sha1((title + body).encode()).hexdigest()[:8]  # "g": not to be taken for a colour
    body = _ids_of_its_own(body.replace("xlink:href", "href"), prefix)
    body = re.sub(r"#[0-9a-f]{6}", lambda m: f"var(--{_VARIABLES[m[0]]})" if m[0] in _VARIABLES else m[0], body)
    body = re.sub(r"\n\s*", "\n", body)
    width, height = (72 * inches for inches in _SIZE)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_attribute(title)}">{body}'


def _rounded(found: re.Match) -> str:
    return f'{found[1]}="' + re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", found[2]) + '"'


def _ids_of_its_own(body: str, prefix: str) -> str:
    """Drop ids that nothing refers to; make the others differ from those of the page's other charts."""
    used = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', body))
    body = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", body)
    return re.sub(r'(url\(#|href="#)(?=[\w.-]+)', rf"\g<1>{prefix}-", body)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
