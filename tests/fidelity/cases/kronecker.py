"""Kronecker-factored preconditioners."""

from __future__ import annotations

from typing import Any

import pytorch_optimizer
from harness import Case, Oracle
from references.kronecker import SOAP
from torch import Tensor

MAGNIFIED = "it magnifies near-null directions, whose eigenvectors float32 does not determine"
# A refresh of a factor of deficient rank completes the basis arbitrarily, and gradients that later
# appear there are magnified. So where bases are refreshed, the LLaMA's tables (rows of unseen
# tokens) are longer than `max_precond_dim` in their vocabulary, and shapes with fewer rows and
# columns than the gradients up to the first refresh span are left to "soap first basis".
FULL_RANK = ((), (1,), (7,), (8, 8), (12, 5), (5, 12), (12, 5), (6, 2, 3, 3))


def adopt_first(reference: SOAP, state: dict[str, Any], step: int) -> None:
    if step == 1:
        bases = [state.get(f"basis_{side}") for side in ("left", "right")]
        tolerance = 1e-9 if state["exp_avg"].element_size() == 8 else 1e-5
        reference.adopt(
            *(None if b is None else b.double().numpy().copy() for b in bases), tolerance
        )


CASES = [
    Case(
        "soap",
        {"lr": 3e-3, "max_precond_dim": 60},
        after=adopt_first,
        shapes=FULL_RANK,
        tolerance32=6e-2,
        reason=MAGNIFIED,
    ),
    Case(
        "soap",
        {
            "lr": 3e-3,
            "betas": (0.9, 0.97),
            "shampoo_beta": 0.9,
            "eps": 1e-6,
            "update_interval": 7,
            "max_precond_dim": 60,
        },
        "every 7",
        after=adopt_first,
        shapes=FULL_RANK,
        tolerance32=6e-2,
        reason=MAGNIFIED,
    ),
    Case(
        "soap",
        {"lr": 3e-3, "update_interval": 1000},
        "first basis",
        after=adopt_first,
        tolerance32=6e-2,
        reason=MAGNIFIED,
    ),
]


def soap(params: list[Tensor], update_interval: int = 10, **options: Any) -> Any:
    assert options.pop("weight_decay") == 0
    return pytorch_optimizer.SOAP(
        params, precondition_frequency=update_interval, weight_decay=0.0, **options
    )


ORACLES = [
    Oracle(
        "soap",
        "pytorch-optimizer",
        soap,
        ((8, 8), (6, 6), (7,)),
        {"lr": 3e-3, "weight_decay": 0.0, "update_interval": 100, "eps": 1e-13},
        tolerance32=1e-3,
        tolerance64=1e-9,
        difference="it decays after the step, adds eps before the bias correction",
        label="no refresh",
    ),
]
