"""Lightning callbacks that watch, keep, report and steer a run.

They know a module by its logged names and a few documented attributes: `save_pretrained(folder)`, on-policy modules'
`samples`, `per_token` and `clock` (the last rollout, and where time goes), and the dict of columns that validation and
predict steps return. All but the controllers only look: take any of them out, and the parameters of an uninterrupted
run stay the same bit for bit.

    samples.py             a few rollouts of every iteration, to samples.csv and the loggers
    validation_samples.py  all held-out responses of every evaluation, to validation.csv and the loggers
    token_view.py          responses with their tokens coloured by KL, value or advantage, as HTML
    reliability.py         of reward models: a reliability diagram
    report.py              the run's page, report.html, made from the files in its folder
    summary.py             the final figures of a stage, to the terminal and summary.json
    provenance.py          what was run, on what, with which data: run.json
    throughput.py          tokens per second, utilisation, memory
    progress.py            a progress bar with the phase and the figures that matter
    wandb_axes.py          which metric Weights & Biases draws over which
    sinks.py               tables, pages and pictures for W&B, TensorBoard and MLflow
    export.py              the trained model, and the best one, as Hugging Face folders
    checkpoint.py          ModelCheckpoint, with a `last` that is the last
    alarms.py              warn or stop where a metric goes wrong; alarm.py is what they share
    watchdogs.py           the same for NaN, stalled data and slow steps; reproducer.py is what a NaN leaves
    controllers.py         what steers a run: reference refresh, entropy target, averaged weights
    preemption.py          SIGTERM and SLURM's requeue signal: save and stop, so that the run can go on
    predictions.py         what `predict` returns, as JSON lines
    rng_state.py           random number generators in the checkpoint, so that a resumed run continues exactly
"""

from .alarm import Alarm, MetricAlarm
from .alarms import (
    CriticAlarm,
    EntropyAlarm,
    EOSAlarm,
    KLAlarm,
    LengthAlarm,
    OveroptimizationAlarm,
    RatioAlarm,
    SpreadAlarm,
)
from .checkpoint import RunCheckpoint
from .controllers import EMAWeights, EntropyTarget, ReferenceRefresh
from .export import HuggingFaceExport
from .predictions import JSONLinesWriter
from .preemption import Preemption
from .progress import ProgressBar
from .provenance import Provenance
from .reliability import Reliability
from .report import RunReport
from .rng_state import RNGState
from .samples import SampleTable
from .summary import StageSummary
from .throughput import Throughput
from .token_view import TokenView
from .validation_samples import ValidationSamples
from .wandb_axes import WandbAxes
from .watchdogs import NonFiniteAlarm, SlowStepAlarm, StalledDataAlarm

ALARMS = (
    CriticAlarm,
    EntropyAlarm,
    EOSAlarm,
    KLAlarm,
    LengthAlarm,
    NonFiniteAlarm,
    OveroptimizationAlarm,
    RatioAlarm,
    SlowStepAlarm,
    SpreadAlarm,
    StalledDataAlarm,
)
"""Every alarm; `train.py` sets them all to warn."""

__all__ = [
    "Alarm",
    "CriticAlarm",
    "EMAWeights",
    "EOSAlarm",
    "EntropyAlarm",
    "EntropyTarget",
    "HuggingFaceExport",
    "JSONLinesWriter",
    "KLAlarm",
    "LengthAlarm",
    "MetricAlarm",
    "NonFiniteAlarm",
    "OveroptimizationAlarm",
    "Preemption",
    "ProgressBar",
    "Provenance",
    "RNGState",
    "RatioAlarm",
    "ReferenceRefresh",
    "Reliability",
    "RunCheckpoint",
    "RunReport",
    "SampleTable",
    "SlowStepAlarm",
    "SpreadAlarm",
    "StageSummary",
    "StalledDataAlarm",
    "Throughput",
    "TokenView",
    "ValidationSamples",
    "WandbAxes",
]
