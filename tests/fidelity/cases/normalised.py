"""Gradients normalised by rows, columns or singular values."""

from __future__ import annotations

from harness import Case, Oracle

MAGNIFIED = "each iteration magnifies small singular values, and rounding errors, up to 2.4 times"

CASES = [
    Case("rmnp", {"lr": 0.02}),
    Case(
        "rmnp",
        {"lr": 0.02, "momentum": 0.9, "nesterov": False, "shape_scale": False, "eps": 1e-3},
        "paper",
    ),
    Case("swan", {"lr": 0.02}, tolerance32=1e-4, reason=MAGNIFIED),
    Case(
        "swan",
        {"lr": 0.02, "center": False, "scale": 0.2, "beta": 0.5, "eps": 1e-4, "ns_steps": 8},
        "beta 0.5",
    ),
    Case("sinkgd", {"lr": 0.02}),
    Case("sinkgd", {"lr": 0.02, "iterations": 2, "scale": 0.2, "eps": 1e-2}, "2 iterations"),
    Case("scale", {"lr": 0.02}),
    Case("scale", {"lr": 0.02, "momentum": 0.8, "norm": "column", "eps": 1e-2}, "column"),
]

ORACLES: list[Oracle] = []
