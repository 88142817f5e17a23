"""Dion and Scion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import torch
from harness import Case, Oracle
from pytorch_optimizer.optimizer.scion import LMONorm
from torch import Tensor

from cases.orthogonal import EPS, exact
from cases.sgd_sign import MATRICES

SMALL_COLUMNS = (
    "it gives the smallest column of R, and its rounding errors, the norm of the largest"
)

CASES = [
    # A rank above that of the momentum leaves columns of rounding errors.
    Case("dion", {"lr": 0.02, "rank": 8}, tolerance32=1e-4, reason=SMALL_COLUMNS),
    Case("dion", {"lr": 0.02, "rank": 2, "momentum": 0.8, "eps": 1e-4}, "rank 2"),
    Case("scion", {"lr": 1e-3}),
    Case(
        "scion",
        {
            "lr": 1e-3,
            "momentum": 0.3,
            "norm": "row",
            "scale": 20.0,
            "ns_steps": 4,
            "head_norm": "column",
            "head_scale": 10.0,
            "embedding_norm": "sign",
            "embedding_scale": 30.0,
            "vector_scale": 2.0,
        },
        "row",
    ),
    Case("scion", {"lr": 0.02, "constrained": False, "scale": 1.0}, "unconstrained"),
    Case("scion", {"lr": 1e-3, "norm": "sign"}, "sign"),
    Case("scion", {"lr": 1e-3, "norm": "column", "scale": 10.0}, "column"),
    Case("scion_light", {"lr": 1e-3}),
    Case(
        "scion_light",
        {"lr": 0.02, "constrained": False, "scale": 1.0, "momentum": 0.4},
        "unconstrained",
    ),
]


def scion(norm: LMONorm, **options: Any) -> Callable[..., torch.optim.Optimizer]:
    """Return kozistr's Scion with one of its norms."""
    make = exact(pytorch_optimizer.SCION, norm_type=norm, norm_kwargs=options, foreach=False)

    def made(params: list[Tensor], *, constrained: bool, **hyper: Any) -> torch.optim.Optimizer:
        del hyper["norm"]
        return make(params, constraint=constrained, **hyper)

    return made


ORACLES = [
    Oracle(
        "scion",
        "pytorch-optimizer",
        scion(LMONorm.SPECTRAL),
        MATRICES,
        {"lr": 1e-3, "weight_decay": 0.0, "norm": "spectral", "constrained": True, "scale": 50.0},
        tolerance64=1e-5,
        role="hidden",
        difference=EPS,
    ),
    Oracle(
        "scion",
        "pytorch-optimizer",
        scion(LMONorm.SIGN),
        MATRICES,
        {"lr": 0.02, "norm": "sign", "constrained": False, "scale": 20.0},
        role="hidden",
        label="sign",
    ),
    Oracle(
        "scion",
        "pytorch-optimizer",
        scion(LMONorm.ROW),
        MATRICES,
        {"lr": 0.02, "norm": "row", "constrained": False, "scale": 2.0},
        role="hidden",
        label="row",
    ),
    Oracle(
        "scion",
        "pytorch-optimizer",
        scion(LMONorm.BIAS),
        ((7,), (40,)),
        {"lr": 0.02, "norm": "rms", "constrained": False, "scale": 2.0},
        role="hidden",
        label="rms",
    ),
]
