"""A step that has been taken, and its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steepest.train.learner import Gradient
from steepest.train.timing import Mark


@dataclass(frozen=True)
class StepTaken:
    """What is known of a step; on a GPU its tensors may still be in the making."""

    step: int
    gradient: Gradient
    lrs: dict[str, float]
    batch_size: int
    rows: int
    """Rows that the run had seen after it."""
    skipped: int
    """Steps that had been left out for want of finite gradients."""
    marks: tuple[Mark, Mark, Mark, Mark, Mark]
    moved: dict[str, Tensor]
    """Update-to-weight ratios by role, 0-d; empty unless the step is logged."""

    def numbers(self, clip_norm: float) -> dict[str, Any]:
        """Return what metrics.jsonl tells of the step; what is not finite is None there."""
        norm = finite(self.gradient.norm)
        return {
            "batch_size": self.batch_size,
            "loss": finite(self.gradient.loss),
            "lr": self.lrs,
            "grad_norm": norm,
            "clipped_grad_norm": min(norm, clip_norm) if norm is not None and clip_norm else norm,
            **{name: finite(value) for name, value in self.gradient.statistics.items()},
            "update_ratio": {role: finite(ratio) for role, ratio in self.moved.items()},
        }


def finite(value: Tensor) -> float | None:
    """Return a 0-d tensor's number, None if it is none."""
    number = float(value.item())
    return number if math.isfinite(number) else None
