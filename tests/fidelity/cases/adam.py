"""Adam and its family."""

from __future__ import annotations

import torch
from harness import Case, Oracle

from cases.sgd_sign import ANY

CASES = [
    Case("adamw", {"lr": 3e-3}),
    Case("adamw", {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6}, "0.8 0.95"),
]

ORACLES = [
    Oracle("adamw", "torch", torch.optim.AdamW, ANY, {"lr": 3e-3}),
    Oracle(
        "adamw",
        "torch",
        torch.optim.AdamW,
        ANY,
        {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6},
        label="0.8 0.95",
    ),
]
