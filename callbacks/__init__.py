"""Lightning callbacks that watch, keep and report a run; none of them changes what is learned.

They know a module by its logged names and three documented things: `save_pretrained(folder)`, the attribute `samples`
(on-policy modules: columns of the last rollout) and the dict of columns that its validation and predict steps return.
Take any of them out and the parameters of an uninterrupted run stay the same bit for bit.

    samples.py      a few rollouts of every iteration, to samples.csv and Weights & Biases
    report.py       before and after PPO, in report.md: scorecard.py judges, plots.py draws, rendering.py writes
    summary.py      the final figures of a stage, to the terminal and summary.json
    progress.py     a progress bar with the figures that matter
    export.py       the trained model as a Hugging Face folder
    preemption.py   SIGTERM and SLURM's requeue signal: save and stop, so that the run can go on
    predictions.py  what `predict` returns, as JSON lines
    rng_state.py    random number generators in the checkpoint, so that a resumed run continues exactly
"""

from .export import HuggingFaceExport
from .predictions import JSONLinesWriter
from .preemption import Preemption
from .progress import ProgressBar
from .report import PPOReport
from .rng_state import RNGState
from .samples import SampleTable
from .summary import StageSummary

__all__ = [
    "HuggingFaceExport",
    "JSONLinesWriter",
    "PPOReport",
    "Preemption",
    "ProgressBar",
    "RNGState",
    "SampleTable",
    "StageSummary",
]
