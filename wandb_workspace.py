"""A saved view of a W&B project, and a report on it, with what belongs together in one place.

    python train.py workspace --project lightning-rlhf
    python train.py workspace --project lightning-rlhf --entity my-team --report

W&B's own view has a plot for each logged name, in the order of the alphabet. Here `panels` says in plain values which
plots there are, by the names of docs/metrics.md; sections of methods that a project has no runs of stay empty. To save
them needs an account and the package wandb-workspaces (https://docs.wandb.ai/ref/wandb_workspaces/).
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from math import ceil
from types import ModuleType
from typing import Any, NamedTuple

from .callbacks.wandb_axes import BY_ITERATION, FRONTIER, ITERATION, STEP, frontier_axis
from .modules.checks import require

NAME = "lightning-rlhf"
OFFLINE = {"offline", "disabled", "dryrun"}
GRID = 24
"""Units across a report's page."""
SHARE, CORRELATION = (0.0, 1.0), (-1.0, 1.0)


class Curves(NamedTuple):
    """Figures of each run over one axis."""

    title: str
    names: tuple[str, ...]
    """As in docs/metrics.md: one with a part in <> stands for all such names."""
    x: str
    between: tuple[float, float] | None = None
    """Ends of the other axis, where all figures have them."""


class Points(NamedTuple):
    """A point for each run: the last values of two figures."""

    title: str
    x: str
    y: str


class Media(NamedTuple):
    """Pictures or pages of each run."""

    title: str
    names: tuple[str, ...]


class Table(NamedTuple):
    """A table with rows of all runs."""

    name: str


Panel = Curves | Points | Media | Table


class Section(NamedTuple):
    """Panels under a heading."""

    title: str
    panels: list[Panel]

    @property
    def columns(self) -> int:
        """How many panels stand side by side; tables take the whole width."""
        return 1 if any(isinstance(panel, Table) for panel in self.panels) else 3


# --- what is shown ----------------------------------------------------------------------------------------------------


def axis(name: str, rolls_out: bool) -> str:
    """The x-axis that `WandbAxes` gives a name.

    Args:
        name: of a figure.
        rolls_out: whether the module that logs it samples; others have no iterations.
    """
    if name in FRONTIER:
        return frontier_axis(FRONTIER[name][1])
    return ITERATION if rolls_out and (name in BY_ITERATION or name.endswith("/reward/<name>")) else STEP


def curves(title: str, *names: str, between: tuple[float, float] | None = None, rolls_out: bool = True) -> Curves:
    """Curves over the axis that their names have in common."""
    (x,) = {axis(name, rolls_out) for name in names}
    return Curves(title, names, x, between)


over_steps = partial(curves, rolls_out=False)
"""Curves of methods that do not sample, or of all methods: optimizer steps are what all have."""


def panels() -> list[Section]:
    """All sections, in their order."""
    return [
        Section("Reward and KL", _reward_and_kl()),
        Section("Responses", _responses()),
        Section("Policy updates", _policy_updates()),
        Section("Value model", _value_model()),
        Section("Reward model", _reward_model()),
        Section("Preference methods", _preference_methods()),
        Section("Loss", _loss()),
        Section("Samples", [Table("samples/validation"), Table("samples/rollouts"), Media("Tokens", ("tokens/view",))]),
        Section("Time and memory", _time_and_memory()),
    ]


def _reward_and_kl() -> list[Panel]:
    return [
        curves("Reward", "rollout/reward", "val/reward", "val/reference_reward"),
        curves("KL to the reference, nats per response", "rollout/kl", "rollout/kl_k3", "val/kl"),
        curves("Reward over KL", "frontier/reward"),
        curves("Held-out reward over KL", "frontier/val_reward"),
        Points("Last reward and KL of each run", x="rollout/kl", y="rollout/reward"),
        curves("Win rate, 95% interval", "val/win_rate_low", "val/win_rate", "val/win_rate_high", between=SHARE),
        curves("Components of the reward", "rollout/reward/<name>"),
        curves("Standard deviation of the reward", "rollout/reward_std"),
        curves("KL per token, nats", "rollout/kl_per_token", "rollout/kl_k3_per_token"),
        curves("Groups with a spread of rewards", "rollout/groups_with_spread", between=SHARE),
        curves("How often was sampled", "rollout/sampling_rounds"),
        curves("RFT: reward of what is learned", "rollout/best_reward", "rollout/reward"),
        curves("Online DPO: gap between the scores of a pair", "rollout/pair_gap"),
        curves("Online DPO: pairs with equal scores", "rollout/tied_pairs", between=SHARE),
    ]


def _responses() -> list[Panel]:
    return [
        curves("Entropy per token, nats", "rollout/entropy", "val/entropy"),
        curves("Sampler against trainer, abs. log-ratio", "rollout/sampler_gap", "rollout/sampler_gap_max"),
        curves("Length, tokens", "rollout/response_length", "val/response_length", "rollout/best_length"),
        curves("Ended; cut off at the limit", "rollout/eos_rate", "rollout/truncated_rate", between=SHARE),
        curves("Different 1-grams and 2-grams", "rollout/distinct_1", "rollout/distinct_2", between=SHARE),
        curves("Correlation of reward and length", "rollout/reward_length_correlation", between=CORRELATION),
    ]


def _policy_updates() -> list[Panel]:
    return [
        curves("Policy loss", "policy/loss"),
        curves("KL of an update, nats per token", "policy/approx_kl"),
        curves("Clipped tokens", "policy/clip_fraction", between=SHARE),
        curves("Ratio: mean and extremes", "policy/ratio_min", "policy/ratio", "policy/ratio_max"),
        curves("Log-ratio before the first step, 0 in theory", "policy/first_ratio_error"),
        curves("Norm of the policy's gradient", "policy/grad_norm"),
        curves("Weight of the KL", "policy/kl_coef"),
        curves("Weight of the entropy bonus", "policy/entropy_coef"),
    ]


def _value_model() -> list[Panel]:
    return [
        curves("Value loss", "value/loss"),
        curves("Explained variance", "value/explained_variance"),
        curves("Clipped values", "value/clip_fraction", between=SHARE),
        curves("Norm of the value model's gradient", "value/grad_norm"),
    ]


def _reward_model() -> list[Panel]:
    return [
        over_steps("Agreement", "train/agreement", "val/agreement", "val/agreement_length_baseline", between=SHARE),
        over_steps("Agreement by gap", "val/agreement", "val/agreement_gap_1", "val/agreement_gap_2", between=SHARE),
        over_steps("Agreement by source", "val/agreement/<source>", between=SHARE),
        over_steps("Margin, preferred less other", "train/margin", "val/margin"),
        over_steps("Calibration error", "val/calibration_error", "val/level_calibration_error"),
        Media("Reliability", ("val/reliability", "val/reliability_levels")),
        over_steps("Correlation with mean ratings", "val/pearson", "val/spearman", between=CORRELATION),
        over_steps("Correlation of score and length", "val/length_correlation", between=CORRELATION),
        over_steps("Raw scores, training", "train/raw_min", "train/raw_mean", "train/raw_max"),
        over_steps("Raw scores, held out", "val/raw_min", "val/raw_mean", "val/raw_max"),
        over_steps("Standard deviation of raw scores", "val/raw_std"),
    ]


def _preference_methods() -> list[Panel]:
    return [
        over_steps("Accuracy", "train/accuracy", "val/accuracy", between=SHARE),
        over_steps("Accuracy by source", "val/accuracy/<source>", between=SHARE),
        over_steps("Margin, chosen less rejected", "train/margin", "val/margin"),
        over_steps("Implicit rewards, training", "train/reward_chosen", "train/reward_rejected"),
        over_steps("Implicit rewards, held out", "val/reward_chosen", "val/reward_rejected"),
        over_steps("Log-probabilities, training", "train/logprob_chosen", "train/logprob_rejected"),
        over_steps("Log-probabilities, held out", "val/logprob_chosen", "val/logprob_rejected"),
        over_steps("KTO: implicit rewards, training", "train/reward_desirable", "train/reward_undesirable"),
        over_steps("KTO: implicit rewards, held out", "val/reward_desirable", "val/reward_undesirable"),
        over_steps("KTO: log-probabilities, training", "train/logprob_desirable", "train/logprob_undesirable"),
        over_steps("KTO: log-probabilities, held out", "val/logprob_desirable", "val/logprob_undesirable"),
        over_steps("KTO: z", "train/kl", "val/kl"),
        over_steps("KL to the reference, nats per token", "val/kl_per_token"),
        over_steps("Entropy per token, nats", "val/entropy"),
    ]


def _loss() -> list[Panel]:
    return [
        over_steps("Loss", "train/loss", "val/loss"),
        over_steps("Perplexity", "val/perplexity"),
        over_steps("Norm of the gradient", "train/grad_norm"),
    ]


def _time_and_memory() -> list[Panel]:
    return [
        curves("Seconds", "time/rollout", "time/scoring", "time/update", "time/iteration"),
        curves("Response tokens per second", "throughput/tokens_per_second"),
        over_steps("Trained tokens per second", "throughput/trained_tokens_per_second"),
        over_steps("Share of the device's peak (MFU)", "throughput/mfu"),
        over_steps("Peak memory, GiB", "memory/peak_gib"),
        curves("Responses so far", "progress/episodes"),
        curves("Response tokens so far", "progress/tokens"),
        curves("Optimizer steps so far", "progress/optimizer_steps"),
    ]


# --- in W&B -----------------------------------------------------------------------------------------------------------


def make_workspace(project: str = NAME, entity: str | None = None, report: bool = False) -> list[str]:
    """Save a view of a project in W&B, a new one each time, and return its address.

    Args:
        project: of the runs.
        entity: the user or team that has the project; None is your default one.
        report: save a report with the same panels, too; its address comes second.
    """
    mode = os.environ.get("WANDB_MODE")
    if mode in OFFLINE:
        raise ValueError(
            f"WANDB_MODE is {mode}, but a workspace is on W&B's server. Upload the runs with `wandb sync`, and give "
            "the command again without WANDB_MODE."
        )
    workspaces, reports = library()
    entity = find_project(project, entity)
    made = [view(workspaces, reports, entity, project)]
    if report:
        made.append(page(reports, entity, project))
    with told_briefly():
        return [one.save().url for one in made]


def library() -> tuple[ModuleType, ModuleType]:
    """W&B's modules for workspaces and for reports."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ValueError(
            "`workspace` needs the package wandb-workspaces: pip install 'lightning-rlhf[workspace]'"
        ) from error
    return workspaces, reports


def find_project(project: str, entity: str | None) -> str:
    """The entity of a project that exists; W&B itself would save a view of any, and make a project for a report."""
    import wandb

    with told_briefly():
        api = wandb.Api()
        entity = entity or api.settings["entity"] or api.default_entity
        known = [found.name for found in api.projects(entity)] if entity else []
    if not entity:
        raise ValueError("`entity`: your W&B account has no default one; name the user or team of the project.")
    near = ", ".join(get_close_matches(project, known, n=5, cutoff=0.0)) or "nothing yet"
    require("project", project in known, f"a project of {entity}, which has {near}", project)
    return entity


@contextmanager
def told_briefly() -> Iterator[None]:
    """Say in a line why W&B does not answer: no credentials, wrong ones, no network, no access."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"W&B could not be used: {error}") from error


def view(workspaces: ModuleType, reports: ModuleType, entity: str, project: str) -> Any:
    """The view, not yet saved; its first section is open."""
    sections = [
        workspaces.Section(
            name=section.title,
            panels=drawn(section, reports),
            is_open=number == 0,
            layout_settings=workspaces.SectionLayoutSettings(
                columns=section.columns, rows=ceil(len(section.panels) / section.columns)
            ),
        )
        for number, section in enumerate(panels())
    ]
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections)


def page(reports: ModuleType, entity: str, project: str) -> Any:
    """The report, not yet saved."""
    blocks = [reports.TableOfContents()]
    for section in panels():
        runs = reports.Runset(entity=entity, project=project, name="Runs")
        blocks += [reports.H2(section.title), reports.PanelGrid(runsets=[runs], panels=drawn(section, reports))]
    return reports.Report(entity=entity, project=project, title=NAME, blocks=blocks, width="fluid")


def drawn(section: Section, reports: ModuleType) -> list[Any]:
    """A section's panels as W&B's, in rows."""
    width = GRID // section.columns
    height = 6 if section.columns > 1 else 12
    return [
        _drawn(
            panel,
            reports,
            reports.Layout(x=i % section.columns * width, y=i // section.columns * height, w=width, h=height),
        )
        for i, panel in enumerate(section.panels)
    ]


def _drawn(panel: Panel, reports: ModuleType, layout: Any) -> Any:
    if isinstance(panel, Curves):
        patterns = [re.sub("<.*?>", ".+", name) for name in panel.names if "<" in name]
        return reports.LinePlot(
            title=panel.title,
            x=panel.x,
            y=[name for name in panel.names if "<" not in name],
            metric_regex="|".join(patterns) or None,
            range_y=panel.between or (None, None),
            layout=layout,
        )
    if isinstance(panel, Points):
        return reports.ScatterPlot(title=panel.title, x=panel.x, y=panel.y, layout=layout)
    if isinstance(panel, Media):
        return reports.MediaBrowser(title=panel.title, media_keys=list(panel.names), layout=layout)
    return reports.WeavePanelSummaryTable(table_name=panel.name, layout=layout)
