"""Averages of the weights over training, evaluated beside the weights themselves."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from steepest.errors import UserError
from steepest.train.precision import floats


@dataclass(frozen=True)
class AveragingConfig:
    """Averages of the weights that are evaluated beside them."""

    every: int = 10
    """Steps between the samples of weights that averages are made of."""
    ema: tuple[float, ...] = ()
    """Decays of exponential averages: average = decay * average + (1 - decay) * sample."""
    windows: tuple[int, ...] = ()
    """Numbers of latest samples of uniform averages (LAWA). The largest are kept in memory."""
    start: int = 0
    """First step whose weights count, as the end of warmup."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"averaging.every must be at least 1, not {self.every}.")
        if self.start < 0:
            raise UserError(f"averaging.start must be at least 0, not {self.start}.")
        for decay in self.ema:
            if not 0 < decay < 1:
                raise UserError(f"averaging.ema must be between 0 and 1, not {decay}.")
        for window in self.windows:
            if window < 1:
                raise UserError(f"averaging.windows must be at least 1, not {window}.")
        for name, values in (("ema", self.ema), ("windows", self.windows)):
            if len(set(values)) < len(values):
                raise UserError(f"averaging.{name} has a value more than once: {list(values)}.")

    def check(self, steps: int) -> None:
        """Raise UserError for an average that at most `steps` steps have too few samples for."""
        samples = max(0, steps // self.every - max(self.start - 1, 0) // self.every)
        needed = max([*self.windows, *(1 for _ in self.ema)], default=0)
        if needed > samples:
            raise UserError(
                f"averaging needs {needed} samples of weights, one every {self.every} steps from "
                f"step {self.start} on, but training.steps is {steps}, which has {samples}; lower "
                "averaging.every, start or windows."
            )


class Averages:
    """The averages of a model's parameters, each parameter once however often it is used.

    Uniform averages over the latest samples are those of LAWA (Kaddour, 2022, arXiv:2209.14981).
    Averages are kept in float32 (float64 of float64 weights).
    """

    def __init__(self, config: AveragingConfig, model: nn.Module) -> None:
        self.config = config
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.exponential: dict[float, list[Tensor]] = {}
        self.samples: deque[list[Tensor]] = deque(maxlen=max(config.windows, default=0))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`, counted from 1, if they are a sample."""
        if step < self.config.start or step % self.config.every != 0:
            return
        sample = [
            floats(p).to(torch.promote_types(p.dtype, torch.float32)) for p in self.parameters
        ]
        for decay in self.config.ema:
            if decay not in self.exponential:
                self.exponential[decay] = [s.clone() for s in sample]
            else:
                torch._foreach_lerp_(self.exponential[decay], sample, 1 - decay)
        if self.config.windows:
            self.samples.append([s.clone() for s in sample])

    def names(self) -> list[str]:
        """Return the averages that there are by now."""
        exponential = [f"ema_{decay!r}" for decay in self.exponential]
        filled = [f"window_{n}" for n in self.config.windows if n <= len(self.samples)]
        return exponential + filled

    @contextmanager
    def weights(self, name: str) -> Iterator[None]:
        """Put an average in the place of the weights, which come back to the bit."""
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p, average in zip(self.parameters, self._average(name), strict=True):
                p.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.parameters, kept, strict=True):
                    p.copy_(value)

    def _average(self, name: str) -> list[Tensor]:
        kind, _, number = name.partition("_")
        if kind == "ema":
            return self.exponential[float(number)]
        latest = list(self.samples)[-int(number) :]
        return [torch.stack(values).mean(0) for values in zip(*latest, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs; of sharded weights, in process 0 alone."""
        return {
            "ema": {
                f"{decay!r}": [_gathered(v) for v in values]
                for decay, values in self.exponential.items()
            },
            "samples": [[_gathered(v) for v in values] for values in self.samples],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.exponential = {
            float(decay): self._placed(values) for decay, values in state["ema"].items()
        }
        self.samples.clear()
        self.samples.extend(self._placed(values) for values in state["samples"])

    def _placed(self, values: list[Tensor]) -> list[Tensor]:
        return [
            distribute_tensor(v, p.device_mesh, p.placements)
            if isinstance(p, DTensor)
            else v.to(p.device)
            for v, p in zip(values, self.parameters, strict=True)
        ]


def _gathered(tensor: Tensor) -> Tensor:
    """Return a tensor whole: of processes that hold parts, in the memory of the first one's CPU."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()
    return gathered.cpu() if tensor.device_mesh.get_rank() == 0 else gathered.new_empty(0)
