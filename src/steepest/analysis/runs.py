"""What the analysis knows of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    """One measurement on the held-out data.

    `tokens` and `seconds` are training tokens and training time up to it; `val_loss` is in nats
    per token and finite.
    """

    step: int
    tokens: int
    val_loss: float
    seconds: float


@dataclass(frozen=True)
class Run:
    """A complete training run: it finished, or it diverged and has no final loss.

    Losses are in nats per token, times named `_ms` in milliseconds, the others in seconds.
    """

    hash: str
    optimizer: str
    lr: float
    seed: int
    status: str
    """"finished" or "diverged"."""
    steps: int
    tokens: int
    val_loss: float | None
    bits_per_byte: float | None
    step_ms: float
    """Median wall time of a whole training step."""
    optimizer_ms: float
    """Median time of the optimizer's part of a step."""
    tokens_per_second: float
    seconds: float
    """Training time, without evaluation and compilation."""
    parameters: int
    parameter_bytes: int
    state_bytes: int
    """Memory that the optimizer's state takes."""
    diverged_at_step: int | None
    reason: str | None
    evaluations: tuple[Evaluation, ...]
    train_curve: tuple[tuple[int, float], ...]
    """Pairs (step, training loss)."""
    warnings: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the run has a final loss."""
        return self.status == "finished" and self.val_loss is not None


def final_losses(runs: Iterable[Run]) -> list[float]:
    """Return the final validation losses of the runs that have one."""
    return [run.val_loss for run in runs if run.finished and run.val_loss is not None]


def by_optimizer(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Group runs by optimizer, in order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.optimizer, []).append(run)
    return groups
