"""Counting loss spikes."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

WINDOW = 100
"""Losses that a new one is compared with."""
LEAST = 20
"""Fewest of them: before that nothing is a spike."""
DEVIATIONS = 4.0
"""Robust standard deviations above the median at which a loss is a spike."""
LEAST_RISE = 0.1
"""Nats above the median that a spike must have: smaller ones are noise of a quiet run."""
NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


class SpikeCounter:
    """Counts the spikes of a training loss.

    A loss spikes if it is above the median of the 100 losses before it (at least 20) by more than
    4 times 1.4826 times their median absolute deviation, and by more than 0.1 nats, or if it is not
    a finite number. Spiking losses that follow one another are one spike. Medians, unlike means,
    hardly move with the spikes themselves; a loss that stays up is normal after 50 steps.
    """

    def __init__(self) -> None:
        self.count = 0
        self.spiking = False
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def update(self, loss: float) -> None:
        """Take in the loss of the next step."""
        spiking = not math.isfinite(loss) or self._far_above(loss)
        self.count += spiking and not self.spiking
        self.spiking = spiking
        if math.isfinite(loss):
            self.recent.append(loss)

    def _far_above(self, loss: float) -> bool:
        if len(self.recent) < LEAST:
            return False
        middle = median(self.recent)
        if loss <= middle + LEAST_RISE:
            return False
        deviation = NORMAL * median(abs(other - middle) for other in self.recent)
        return loss > middle + DEVIATIONS * deviation

    def state_dict(self) -> dict[str, object]:
        """Return what a checkpoint needs."""
        return {"count": self.count, "spiking": self.spiking, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from `state_dict`."""
        count, spiking, recent = state["count"], state["spiking"], state["recent"]
        assert isinstance(count, int)
        assert isinstance(spiking, bool)
        assert isinstance(recent, list)
        self.count, self.spiking = count, spiking
        self.recent = deque(recent, maxlen=WINDOW)
