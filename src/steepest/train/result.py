"""What result.json tells of a run that has ended."""

from __future__ import annotations

from typing import Any

from steepest.train import optimizers
from steepest.train.precision import stored_bytes
from steepest.train.run_state import RunState

SCHEMA = 1
"""Of result.json."""


def result(state: RunState, warnings: list[str]) -> dict[str, Any]:
    """Return the content of result.json, of a run that has finished or diverged."""
    config, learner, clock, diverged = state.config, state.learner, state.clock, state.diverged
    return {
        "schema": SCHEMA,
        "hash": config.hash(),
        "status": "finished" if diverged is None else "diverged",
        "optimizer": config.optimizer.name,
        "lr": config.optimizer.lr,
        "seed": config.training.seed,
        "steps": state.step,
        "tokens": state.tokens,
        **state.held_out.summary(finished=diverged is None),
        "parameters": sum(p.numel() for p in learner.parameters),
        "parameter_bytes": sum(map(stored_bytes, learner.parameters)),
        "state_bytes": optimizers.state_bytes(learner.optimizer),
        "step_ms": 1000 * clock.step_seconds,
        **{f"{name}_ms": 1000 * s for name, s in clock.part_seconds().items()},
        "tokens_per_second": state.tokens_per_second,
        "flops_per_token": state.flops_per_token,
        "mfu": state.mfu,
        "memory_bytes": state.memory,
        "elapsed_seconds": clock.elapsed_seconds,
        "seconds": clock.seconds,
        "part_seconds": clock.totals(),
        "loss_spikes": state.spikes.count,
        "skipped_steps": state.skipped,
        "diverged_at_step": None if diverged is None else diverged.step,
        "reason": None if diverged is None else diverged.reason,
        "warnings": warnings,
        "config": config.to_dict(),
    }
