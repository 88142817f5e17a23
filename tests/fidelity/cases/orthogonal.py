"""Orthogonalised momentum."""

from __future__ import annotations

import torch
from harness import Case, Oracle

from cases.sgd_sign import MATRICES

CASES = [
    Case("muon", {"lr": 0.02}),
    Case("muon", {"lr": 0.02, "momentum": 0.9, "nesterov": False, "ns_steps": 4}, "plain"),
]

ORACLES = [
    Oracle(
        "muon",
        "torch",
        torch.optim.Muon,
        MATRICES,
        {"lr": 0.02},
        tolerance32=5e-2,
        tolerance64=5e-2,
        role="hidden",
        difference="its products are bfloat16 in another order",
    ),
]
