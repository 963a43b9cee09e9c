"""What models cost and how fast they are, counted, timed, explained and shown on one page."""

import warnings

# `python -m muntin.measure.cost` imports this package first, which imports cost; runpy warns, needlessly here.
warnings.filterwarnings("ignore", message="'muntin.measure", category=RuntimeWarning, module="runpy")

from muntin.measure.bench import BenchReport, bench  # noqa: E402
from muntin.measure.cost import Cost, cost  # noqa: E402
from muntin.measure.profile import Profile, profile  # noqa: E402
from muntin.measure.report import report, summary  # noqa: E402

__all__ = ["BenchReport", "Cost", "Profile", "bench", "cost", "profile", "report", "summary"]
