"""When a run counts as diverged."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

MARGIN = 1.0
"""Nats above the first loss at which a loss counts as lost."""
LEAST_WINDOW = 20
"""Fewest steps that the loss must stay up."""


@dataclass(frozen=True)
class Divergence:
    """The step (counted from 1; 0 is before training) at which a run was given up, and why."""

    step: int
    reason: str


class DivergenceMonitor:
    """Watches training losses.

    A run has diverged if a loss is not finite, or if after warmup every one of the last max(20,
    20 % of all steps) losses is more than 1 nat above the loss of the first step. That loss is the
    one of a uniform guess, ln(vocabulary): the run has long known less than nothing. Shorter
    windows and means give false alarms: AdamW at a learning rate of 1 stays 4 nats above its start
    for 40 of 300 steps, and comes back to beat it.

    Where steps whose gradient is not finite are skipped, `patience` of them in a row are borne.
    """

    def __init__(self, steps: int, warmup_steps: int, patience: int = 0) -> None:
        self.warmup_steps, self.patience = warmup_steps, patience
        self.nonfinite = 0
        self.first_loss: float | None = None
        self.window = max(LEAST_WINDOW, steps // 5)
        self.recent: deque[float] = deque(maxlen=self.window)

    def update(self, step: int, loss: float, norm: float = 0.0) -> Divergence | None:
        """Take the training loss of `step`, counted from 1, and the norm of its gradient.

        Returns the divergence, if it is one. A gradient that is not skipped shows in the next loss.
        """
        lost = not math.isfinite(loss)
        skipped = self.patience > 0 and not math.isfinite(norm)
        self.nonfinite = self.nonfinite + 1 if lost or skipped else 0
        if self.nonfinite > self.patience:
            return Divergence(step, self._nonfinite(step, loss if lost else None))
        if lost:
            return None
        if self.first_loss is None:
            self.first_loss = loss
        if step <= self.warmup_steps:
            return None
        self.recent.append(loss)
        lowest = min(self.recent)
        if len(self.recent) < self.window or lowest <= self.first_loss + MARGIN:
            return None
        return Divergence(
            step,
            f"The last {self.window} training losses at step {step} were all at least "
            f"{lowest:.2f}, and the first was {self.first_loss:.2f}.",
        )

    def _nonfinite(self, step: int, loss: float | None) -> str:
        what = "gradient was not finite" if loss is None else f"training loss was {loss}"
        skipped = f", the last of {self.nonfinite} skipped steps in a row" if self.patience else ""
        return f"The {what} at step {step}{skipped}."

    def state_dict(self) -> dict[str, object]:
        """Return what a checkpoint needs."""
        return {
            "first_loss": self.first_loss,
            "recent": list(self.recent),
            "nonfinite": self.nonfinite,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from `state_dict`."""
        first, recent, nonfinite = state["first_loss"], state["recent"], state["nonfinite"]
        assert first is None or isinstance(first, float)
        assert isinstance(recent, list)
        assert isinstance(nonfinite, int)
        self.first_loss, self.nonfinite = first, nonfinite
        self.recent = deque(recent, maxlen=self.window)


def of_validation(step: int, loss: float) -> Divergence | None:
    """Return the divergence if a held-out loss is not finite."""
    if math.isfinite(loss):
        return None
    return Divergence(step, f"The held-out loss was {loss} at step {step}.")
