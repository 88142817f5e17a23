"""What a run holds in memory, by category."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from steepest.train import precision
from steepest.train.averaging import Averages
from steepest.train.learner import Learner


def by_category(learner: Learner, averages: Averages) -> dict[str, int]:
    """Return the bytes that this process holds, between two steps, and its peak so far.

    `peak` is what torch has allocated at most on a GPU since `forget_peak`, and the largest
    resident set of the process on a CPU, interpreter and libraries included. `activations`, on a
    GPU alone, is what the peak has beside weights, gradients, optimizer state and averages.
    """
    held = {
        "weights": _bytes(learner.parameters),
        "gradients": _bytes([p.grad for p in learner.parameters]),
        "optimizer_state": _bytes(list(learner.optimizer.state.values())),
        "averages": _bytes([*averages.exponential.values(), *averages.samples]),
    }
    if learner.device.type != "cuda":
        return {"peak": _peak_resident(), **held}
    peak = torch.cuda.max_memory_allocated(learner.device)
    return {"peak": peak, **held, "activations": max(peak - sum(held.values()), 0)}


def forget_peak(device: torch.device) -> None:
    """Have the peak on a GPU count from now on; that of a CPU process can't be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _bytes(value: Any) -> int:
    if isinstance(value, DTensor):
        value = value.to_local()
    if isinstance(value, torch.Tensor):
        return precision.stored_bytes(value)
    if isinstance(value, Mapping):
        return sum(_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_bytes(item) for item in value)
    return 0


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage begins with the peak of the process that started this
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
