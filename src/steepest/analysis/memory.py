"""Memory of training states: sums over roles, and the units of published tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

GB = 1e9
"""Bytes of the unit that published tables call GB."""


class Holding(Protocol):
    """What one role's parameters, gradients and optimizer state take."""

    @property
    def role(self) -> str:
        """Name of the role."""

    @property
    def parameters(self) -> int:
        """Number of scalars."""

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters."""

    @property
    def gradient_bytes(self) -> int:
        """Bytes of their gradients."""

    @property
    def state_bytes(self) -> int:
        """Bytes of their optimizer state."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step keeps beside activations."""

    parameters: int
    """Number of scalars."""
    parameter_bytes: int
    gradient_bytes: int
    state_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.parameter_bytes + self.gradient_bytes + self.state_bytes

    @property
    def model_and_state_gb(self) -> float:
        """Parameters and optimizer state in units of 1e9 bytes, as papers on memory count."""
        return (self.parameter_bytes + self.state_bytes) / GB

    @property
    def state_bytes_per_parameter(self) -> float:
        """Bytes of state for each scalar of the model."""
        return self.state_bytes / self.parameters


def memory(holdings: Iterable[Holding]) -> Memory:
    """Return the sums over roles."""
    rows = list(holdings)
    return Memory(
        sum(row.parameters for row in rows),
        sum(row.parameter_bytes for row in rows),
        sum(row.gradient_bytes for row in rows),
        sum(row.state_bytes for row in rows),
    )
