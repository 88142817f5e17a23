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


# Before it has seen as many gradients as a factor's side is long, a factor is singular, and eps to
# the power of -1/4 magnifies what rounding left in its null space: so eps is large, or the factors
# are of full rank at the first root.
CASES += [
    Case("shampoo", {"lr": 3e-3, "weight_decay": 0.1}, "before the first root"),
    Case(
        "shampoo",
        {"lr": 3e-3, "eps": 1e-3, "update_interval": 5, "betas": (0.9, 0.97)},
        "every 5",
        tolerance32=1e-3,
        reason=MAGNIFIED,
    ),
    Case(
        "shampoo",
        {
            "lr": 3e-3,
            "eps": 1e-2,
            "update_interval": 7,
            "start_preconditioning_step": 3,
            "shampoo_beta": 0.9,
        }
        | {"grafting": "sgd", "max_precond_dim": 12},
        "sgd, one-sided",
        tolerance32=1e-3,
        reason=MAGNIFIED,
    ),
    Case(
        "shampoo",
        {"lr": 3e-3, "eps": 1e-2, "update_interval": 4, "accumulate": "sum", "grafting": "none"}
        | {"exponent": 0.2},
        "sum, ungrafted",
        tolerance32=1e-3,
        reason=MAGNIFIED,
    ),
    Case(
        "shampoo",
        {"lr": 3e-3, "eps": 1e-6, "update_interval": 4, "grafting": "none", "max_precond_dim": 1}
        | {"graft_eps": 1e-6},
        "diagonal",
    ),
    Case("kron", {"lr": 3e-3}),
    Case(
        "kron",
        {"lr": 3e-3, "probability": (0.5, 0.2), "probability_decay": 0.1, "probability_start": 9},
        "sometimes",
    ),
    Case(
        "kron",
        {"lr": 3e-3, "momentum": 0.8, "precond_lr": 0.3, "precond_init_scale": 2.0}
        | {"clip_threshold": 0.7, "memory_save_mode": "one_diag", "max_size_triangular": 30}
        | {"momentum_into_precond_update": False},
        "one_diag",
    ),
]


def soap(params: list[Tensor], update_interval: int = 10, **options: Any) -> Any:
    assert options.pop("weight_decay") == 0
    return pytorch_optimizer.SOAP(
        params, precondition_frequency=update_interval, weight_decay=0.0, **options
    )


def scalable_shampoo(params: list[Tensor], **options: Any) -> Any:
    # Its first beta is a heavy ball's after the grafting, its eps is relative.
    found = pytorch_optimizer.ScalableShampoo(
        params,
        lr=options["lr"],
        weight_decay=0.0,
        nesterov=False,
        matrix_eps=0.0,
        start_preconditioning_step=options["start_preconditioning_step"],
        preconditioning_compute_steps=options["update_interval"],
        graft_type=1 if options["grafting"] == "sgd" else 0,
        diagonal_eps=0.0,
        use_svd=True,
        shape_interpretation=False,
    )
    beta = 1.0 if options["accumulate"] == "sum" else options["shampoo_beta"]
    found.param_groups[0]["betas"] = (0.0, beta)
    return found


SHAMPOO = {
    "lr": 3e-3,
    "weight_decay": 0.0,
    "betas": (0.0, 0.9),
    "start_preconditioning_step": 6,
    "eps": 1e-30,
}

ORACLES = [
    Oracle(
        "shampoo",
        "pytorch-optimizer",
        scalable_shampoo,
        ((8, 8), (6, 6), (7, 5)),
        {**SHAMPOO, "shampoo_beta": 0.9, "grafting": "sgd", "accumulate": "ema"}
        | {"update_interval": 3},
        label="sgd",
    ),
    Oracle(
        "shampoo",
        "pytorch-optimizer",
        scalable_shampoo,
        ((8, 8), (6, 6), (7, 5)),
        {**SHAMPOO, "grafting": "none", "accumulate": "sum", "update_interval": 1},
        label="sum",
    ),
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
