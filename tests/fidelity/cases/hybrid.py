"""Methods that treat two parts of a matrix differently."""

from __future__ import annotations

from harness import Case, Oracle

GAP = "float32 finds a subspace to its precision times largest eigenvalue over gap to the next"

CASES = [
    Case("cosmos", {"lr": 1e-3, "rank": 3}, tolerance32=5e-4, reason=GAP),
    Case(
        "cosmos",
        {"lr": 1e-3, "rank": 6, "betas": (0.8, 0.9), "gamma": 0.3, "ns_steps": 4, "eps": 1e-6},
        "rank 6",
        tolerance32=5e-4,
        reason=GAP,
    ),
]

ORACLES: list[Oracle] = []
