"""Learning rates scaled by groups of like momenta."""

from __future__ import annotations

from harness import Case, Oracle

from cases.kronecker import MAGNIFIED

OFTEN = {"recluster_interval": 5, "beta3": 0.5}

CASES = [
    Case("sgg_adamw", {"lr": 3e-3}, "before the first clusters"),
    Case("sgg_adamw", {"lr": 3e-3, **OFTEN}, "every 5"),
    Case(
        "sgg_adamw",
        {"lr": 3e-3, **OFTEN, "betas": (0.8, 0.95), "n_clusters": 2, "scale_bound": (0.5, 1.5)},
        "2 clusters",
    ),
    Case("sgg_lamb", {"lr": 3e-3, **OFTEN}, "every 5"),
    Case(
        "sgg_shampoo",
        {"lr": 3e-3, **OFTEN, "eps": 1e-2, "update_interval": 4},
        "every 5",
        tolerance32=1e-3,
        reason=MAGNIFIED,
    ),
]

ORACLES: list[Oracle] = []
