from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from steepest.analysis import Evaluation, Run


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """A run of 100 steps of 10 tokens; `loss` None means diverged."""

    def make(
        optimizer: str = "adamw",
        loss: float | None = 3.0,
        seed: int = 0,
        lr: float = 0.01,
        curve: Sequence[tuple[int, float]] = (),
        **changes: object,
    ) -> Run:
        values: dict[str, object] = {
            "hash": f"{optimizer}-{lr}-{seed}",
            "optimizer": optimizer,
            "lr": lr,
            "seed": seed,
            "status": "diverged" if loss is None else "finished",
            "steps": 100,
            "tokens": 1000,
            "val_loss": loss,
            "bits_per_byte": None,
            "step_ms": 10.0,
            "optimizer_ms": 1.0,
            "tokens_per_second": 1000.0,
            "seconds": 1.0,
            "parameters": 50,
            "parameter_bytes": 200,
            "state_bytes": 400,
            "diverged_at_step": None if loss is not None else 7,
            "reason": None,
            "evaluations": tuple(Evaluation(s, 10 * s, x, s / 100) for s, x in curve),
            "train_curve": (),
        }
        return Run(**{**values, **changes})  # type: ignore[arg-type]

    return make
