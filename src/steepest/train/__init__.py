"""Training runs: what a run is (`RunConfig`), and doing it (`run`)."""

from steepest.train.averaging import AveragingConfig
from steepest.train.batch_size import BatchConfig
from steepest.train.config import (
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    Runtime,
    TrainingConfig,
    default_lr,
)
from steepest.train.group import FailedElsewhere
from steepest.train.optimizers import build, check
from steepest.train.parallel import check_batch
from steepest.train.progress import Progress
from steepest.train.records import read_metrics
from steepest.train.resolving import is_resolved, resolve
from steepest.train.running import run
from steepest.train.schedules import ScheduleConfig, multiplier, published
from steepest.train.stopping import REQUEUE, Preempted, StopRequest

__all__ = [
    "REQUEUE",
    "AveragingConfig",
    "BatchConfig",
    "DataConfig",
    "EvaluationConfig",
    "FailedElsewhere",
    "OptimizerConfig",
    "Preempted",
    "Progress",
    "RunConfig",
    "Runtime",
    "ScheduleConfig",
    "StopRequest",
    "TrainingConfig",
    "build",
    "check",
    "check_batch",
    "default_lr",
    "is_resolved",
    "multiplier",
    "published",
    "read_metrics",
    "resolve",
    "run",
]
