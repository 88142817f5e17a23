"""Steps limited by an estimate of the curvature."""

from __future__ import annotations

from typing import Any

import sophia_opt
from harness import TOKENS, Case, Oracle
from torch import Tensor

from cases.sgd_sign import ANY

CASES = [
    Case("sophia_g", {"lr": 1e-3}),
    Case("sophia_g", {"lr": 1e-3, "update_interval": 1, "rho": 1.0, "betas": (0.9, 0.95)}, "rho 1"),
    Case("sophia_g", {"lr": 1e-3, "update_interval": 3, "eps": 1e-2}, "eps"),
]


def sophia(params: list[Tensor], update_interval: int, **options: Any) -> Any:
    class OfTokens(sophia_opt.SophiaG):  # type: ignore[misc, unused-ignore]
        """Takes the number of tokens at every step."""

        def step(self) -> None:
            super().step(bs=TOKENS)

    return OfTokens(params, **options)


ORACLES = [
    Oracle(
        "sophia_g",
        "sophia-opt",
        sophia,
        ANY,
        {"lr": 1e-3, "update_interval": interval, "rho": rho},
        observe=lambda other: other.update_hessian(),
        tolerance64=1e-9,
        label=f"rho {rho:g}",
        difference="it was told the tokens, and to estimate when ours did; its eps is 1e-15",
    )
    for interval, rho in ((10, 0.04), (3, 1.0))
]
