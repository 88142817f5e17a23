"""What GPUs can do at most, by their names (peaks.toml)."""

from __future__ import annotations

import fnmatch
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

import torch


@dataclass(frozen=True)
class Peak:
    """The limits of one kind of GPU."""

    names: tuple[str, ...]
    """Patterns of the names that torch has for it."""
    bf16_tflops: float
    """Dense bfloat16 products accumulated in float32, in 10^12 operations per second."""
    memory_gib: float
    """Memory in GiB, which it is sold by as GB."""
    watts: float
    """Board power."""
    source: str

    @property
    def memory_bytes(self) -> float:
        """Memory in bytes."""
        return self.memory_gib * 2**30


@cache
def peaks() -> tuple[Peak, ...]:
    """Return all GPUs of peaks.toml."""
    text = resources.files("steepest.train").joinpath("peaks.toml").read_text(encoding="utf-8")
    return tuple(
        Peak(**{**entry, "names": tuple(entry["names"])}) for entry in tomllib.loads(text)["gpu"]
    )


def peak_of(name: str) -> Peak | None:
    """Return the peak of the GPU that torch calls `name`; None if it is not known."""
    return next(
        (p for p in peaks() if any(fnmatch.fnmatchcase(name, pattern) for pattern in p.names)), None
    )


def utilisation(
    tokens_per_second: float, flops_per_token: float, device: torch.device, processes: int = 1
) -> float | None:
    """Return the model FLOPs utilisation of a run on so many such devices, None without a peak.

    It is the share of the dense bfloat16 peak, whatever the precision of the run.
    """
    if device.type != "cuda":
        return None
    peak = peak_of(torch.cuda.get_device_name(device))
    if peak is None:
        return None
    return tokens_per_second * flops_per_token / (processes * peak.bf16_tflops * 1e12)
