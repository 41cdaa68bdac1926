"""What a run did, on one page: report.html from the files in its folder, and a comparison of several runs.

Nothing here needs the process that trained: a report of a killed run, or of one on another machine, is made alike.

    run.py          reads a folder: every file optional, none trusted to be whole
    scorecard.py    judges held-out samples from before and after
    figures.py      key figures, and which samples to show
    charts.py       draws SVG that follows the page's light and dark theme
    panels.py       which charts a run gets
    page.py         a run's page
    compare.py      several runs: seeds as bands, final figures, differences in the config
"""

from .compare import main_report, write_comparison
from .page import outcome, write_report

__all__ = ["main_report", "outcome", "write_comparison", "write_report"]
