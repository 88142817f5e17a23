"""Training runs: what a run is (`RunConfig`), and doing it (`run`)."""

from steepest.train.config import (
    DataConfig,
    OptimizerConfig,
    RunConfig,
    Runtime,
    ScheduleConfig,
    TrainingConfig,
)
from steepest.train.loop import Progress, run
from steepest.train.optimizers import build, check
from steepest.train.records import read_metrics
from steepest.train.resolving import is_resolved, resolve
from steepest.train.schedules import multiplier

__all__ = [
    "DataConfig",
    "OptimizerConfig",
    "Progress",
    "RunConfig",
    "Runtime",
    "ScheduleConfig",
    "TrainingConfig",
    "build",
    "check",
    "is_resolved",
    "multiplier",
    "read_metrics",
    "resolve",
    "run",
]
