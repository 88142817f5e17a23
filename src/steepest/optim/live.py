"""Live values: what may change from step to step or between runs, as tensors on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Value = float | tuple[float, ...] | Tensor
"""A live hyperparameter: a number, a tuple of numbers, or one number per run (1-D float64)."""


class Hyper:
    """The values that may change from step to step or differ between runs, as 0-d tensors.

    Every float hyperparameter of the rule is an attribute under its own name (`h.lr`, `h.betas`),
    beside what `Rule.scalars`, `Rule.memory` and `Rule.shared` name. They are float64, so that
    `1 - h.betas[1]` keeps its digits; multiplying a float32 tensor by one gives float32.
    """

    def __init__(self, values: Mapping[str, Tensor | tuple[Tensor, ...]]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"The rule has no hyperparameter or scalar named {name!r}.")


def is_live(value: object) -> bool:
    """Say whether a hyperparameter value reaches `update` through `h` rather than `self`."""
    if isinstance(value, tuple):
        return bool(value) and all(isinstance(v, (float, Tensor)) for v in value)
    return isinstance(value, (float, Tensor))


@dataclass(frozen=True)
class Layout:
    """Where each live value sits in the one float64 vector that a step sends to the device."""

    entries: tuple[tuple[str, int], ...]
    """Names with the length of a tuple value, or -1 for a single number."""

    @classmethod
    def of(cls, values: Mapping[str, Value]) -> Layout:
        """Return the layout of these values."""
        return cls(tuple((k, len(v) if isinstance(v, tuple) else -1) for k, v in values.items()))

    def with_single(self, names: Mapping[str, object]) -> Layout:
        """Return the layout with single numbers of these names at the end."""
        return Layout((*self.entries, *((name, -1) for name in names)))

    def pack(self, values: Mapping[str, Value], runs: int | None) -> Tensor:
        """Return the values as float64 `[n]`, or `[n, runs]` when there are runs."""
        flat: list[float | Tensor] = []
        for name, length in self.entries:
            value = values[name]
            flat.extend(value if length >= 0 and isinstance(value, tuple) else [value])  # type: ignore[list-item]
        if runs is None:
            return torch.tensor(flat, dtype=torch.float64)
        if not flat:
            return torch.empty(0, runs, dtype=torch.float64)
        return torch.stack([torch.as_tensor(v, dtype=torch.float64).expand(runs) for v in flat])

    def unpack(self, vector: Tensor) -> Hyper:
        """Return the values of a vector `[n]` as 0-d tensors."""
        scalars = vector.unbind(0)
        values: dict[str, Tensor | tuple[Tensor, ...]] = {}
        at = 0
        for name, length in self.entries:
            if length < 0:
                values[name] = scalars[at]
                at += 1
            else:
                values[name] = scalars[at : at + length]
                at += length
        return Hyper(values)
