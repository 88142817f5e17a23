"""Low-rank methods.

The authors' packages (galore_torch, fira, apollo_torch) need transformers, so they are not among
the oracles. How far the references are from them is in the references' docstrings.
"""

from __future__ import annotations

from typing import Any

import pytorch_optimizer
from harness import Case, Oracle
from references.low_rank import LowRank
from torch import Tensor

from cases.sgd_sign import MATRICES


def adopt(reference: LowRank, state: dict[str, Any], step: int) -> None:
    """Take over the basis of a refresh: what a gradient of lower rank leaves open is arbitrary."""
    if (step - 1) % reference.interval == 0:
        basis = state["basis" if "basis" in state else "projection"]
        tolerance = 1e-9 if basis.element_size() == 8 else 1e-5
        reference.adopt(basis.double().numpy().copy(), tolerance)


NOISE = (
    "a direction that the gradients lack is rounding noise in float32, which Adam divides by itself"
)
CODES = (
    "a moment half way between two 8-bit codes may get the other one in float32, and a weight then "
    "be rounded the other way: one of 9,684 is"
)
DRAWN = "a float32 normal number near zero has few digits, and a 1 x 1 projection is one number"
LARGE = ((520, 10), (10, 520), (8, 8), (6, 10, 9, 8))
"""Shapes of which all but one have a projection on 8 directions that is kept in 8 bits."""
OPTIONS: dict[str, Any] = {
    "lr": 3e-3,
    "rank": 4,
    "update_interval": 7,
    "scale": 0.5,
    "betas": (0.8, 0.95),
}

CASES = [
    Case("galore_adamw", before=adopt),
    Case("galore_adamw", {**OPTIONS, "eps": 1e-4}, "rank 4"),
    Case("galore_adafactor", {"rank": 4}, "rank 4"),
    Case(
        "galore_adafactor",
        {
            "rank": 4,
            "update_interval": 7,
            "scale": 0.5,
            "beta1": 0.9,
            "decay_rate": 0.7,
            "clip_threshold": 0.5,
            "eps": 1e-6,
        },
        "rank 4, beta1",
    ),
    Case("galore_adamw8bit", {"rank": 8}, "rank 8", shapes=LARGE),
    Case(
        "galore_adamw8bit",
        {**OPTIONS, "rank": 8, "eps": 1e-4, "block_size": 100},
        "blocks of 100",
        shapes=LARGE,
    ),
    Case("fira", {"rank": 4}, "rank 4"),
    Case("fira", {**OPTIONS, "eps": 1e-4, "growth_limit": 1.1}, "rank 4, 1.1"),
    Case("conda", before=adopt, tolerance32=1e-2, reason=NOISE),
    Case(
        "conda",
        {"lr": 3e-3, "update_interval": 7, "scale": 1.0, "betas": (0.8, 0.95), "eps": 1e-5},
        "7",
        before=adopt,
    ),
    Case("apollo"),
    Case("apollo", {**OPTIONS, "eps": 1e-4, "growth_limit": 1.1}, "rank 4"),
    Case("apollo", {"rank": 4, "update_interval": 7, "scale_type": "tensor"}, "tensor"),
    Case("apollo_mini", tolerance32=2e-5, reason=DRAWN),
    Case("apollo_mini", {**OPTIONS, "rank": 2, "scale": 8.0}, "rank 2"),
    Case("q_apollo", {"rank": 4}, "rank 4"),
    Case("q_apollo", {**OPTIONS, "eps": 1e-4, "growth_limit": 1.1, "group_size": 50}, "50"),
    Case("q_apollo", {"rank": 4, "update_interval": 7, "scale_type": "tensor"}, "tensor"),
    Case("q_galore", {"rank": 4}, "rank 4"),
    Case(
        "q_galore",
        {"rank": 3, "update_interval": 2, "cos_threshold": 0.7, "queue_size": 3},
        "rarer refreshes",
    ),
    Case(
        "q_galore",
        {**OPTIONS, "rank": 8, "projection_bits": 6, "group_size": 50, "block_size": 100},
        "50",
        shapes=LARGE,
        tolerance32=2e-2,
        reason=CODES,
    ),
]


def galore(params: list[Tensor], **options: Any) -> Any:
    return pytorch_optimizer.GaLore(given(params, options), **options)


def conda(params: list[Tensor], **options: Any) -> Any:
    return pytorch_optimizer.Conda(given(params, options), **options)


def given(params: list[Tensor], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parameters in a group with what is said of the projection, taken from options."""
    own: dict[str, Any] = {name: options.pop(name) for name in ("rank", "scale") if name in options}
    interval = options.pop("update_interval")
    return [{"params": params, "update_proj_gap": interval, "projection_type": "std", **own}]


FIRST = "it refreshes one step earlier, so that the first basis was kept; decay was left out"
NARROW = "its singular vectors are float32"
ORACLES = [
    Oracle(
        "galore_adamw",
        "pytorch-optimizer",
        galore,
        MATRICES,
        {"weight_decay": 0.0, "lr": 1e-2, "rank": 4, "scale": 0.25, "update_interval": 100},
        tolerance64=1e-4,
        role="hidden",
        difference=f"{FIRST}; {NARROW}",
    ),
    Oracle(
        "conda",
        "pytorch-optimizer",
        conda,
        MATRICES,
        {
            "weight_decay": 0.0,
            "lr": 1e-2,
            "scale": 0.25,
            "betas": (0.9, 0.99),
            "update_interval": 100,
        },
        tolerance64=1e-4,
        role="hidden",
        difference=f"{FIRST}; {NARROW}",
    ),
]
