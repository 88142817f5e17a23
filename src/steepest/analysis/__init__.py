"""From tables of runs to answers: pure functions, no files, no torch."""

from steepest.analysis.estimates import Estimate, estimate, paired_difference
from steepest.analysis.memory import Memory, memory
from steepest.analysis.ranking import Row, leaderboard
from steepest.analysis.runs import Evaluation, Run
from steepest.analysis.sweeps import LrCurve, LrPoint, lr_curves
from steepest.analysis.targets import (
    MeanEvaluation,
    mean_curve,
    seconds_to_reach,
    tokens_to_reach,
)

__all__ = [
    "Estimate",
    "Evaluation",
    "LrCurve",
    "LrPoint",
    "MeanEvaluation",
    "Memory",
    "Row",
    "Run",
    "estimate",
    "leaderboard",
    "lr_curves",
    "mean_curve",
    "memory",
    "paired_difference",
    "seconds_to_reach",
    "tokens_to_reach",
]
