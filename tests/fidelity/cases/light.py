"""Methods with little state."""

from __future__ import annotations

from typing import Any

import adam_mini
import came_pytorch
import pytorch_optimizer
from harness import Case, Oracle
from torch import Tensor

from cases.sgd_sign import ANY

LARGE = ((64, 80), (70, 61), (16, 16), (1, 4097), (5000,), (3, 40, 40), ())
"""Shapes of which some are quantised, with and without a last block that is shorter."""
TIES = (
    "a block's largest value is stored in float32: the last digit of float64 decides where it lies "
    "half way between two such numbers"
)
CODES = 5e-7
"""Margin of 8-bit codes: less is within float32's rounding."""

CASES = [
    Case("adafactor", {"lr": 1e-2}),
    Case(
        "adafactor",
        {"lr": 1e-2, "beta1": 0.9, "decay_rate": 0.7, "clip_threshold": 0.5},
        "beta1",
    ),
    Case("came", {"lr": 1e-3}),
    Case(
        "came",
        {
            "lr": 1e-3,
            "betas": (0.8, 0.95, 0.99),
            "eps": 1e-6,
            "eps2": 1e-3,
            "clip_threshold": 0.5,
        },
        "eps2 1e-3",
    ),
    Case("adam_mini"),
    Case("adam_mini", {"betas": (0.8, 0.95), "eps": 1e-3, "blocks": 1}, "one block"),
    Case("adam8bit", shapes=LARGE, margin32=CODES),
    Case(
        "adam8bit",
        {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-5, "block_size": 100},
        "blocks of 100",
        tolerance64=1e-8,
        reason=TIES,
        shapes=LARGE,
        margin32=CODES,
        model=False,
    ),
    Case("adam8bit", {"amsgrad": True}, "amsgrad", shapes=LARGE, margin32=CODES),
    Case("lion8bit", {"lr": 1e-3}, shapes=LARGE, margin32=CODES),
    Case(
        "lion8bit",
        {"lr": 1e-3, "betas": (0.95, 0.98), "block_size": 2048},
        "blocks of 2048",
        shapes=LARGE,
        margin32=CODES,
        model=False,
    ),
]


def adafactor(params: list[Tensor], beta1: float | None = None, **options: Any) -> Any:
    # Beyond names: it keeps the moment in bfloat16 and scales lr by the parameter unless told.
    return pytorch_optimizer.AdaFactor(
        params,
        betas=(beta1, 0.9999999),
        scale_parameter=False,
        relative_step=False,
        momentum_dtype=params[0].dtype,
        **options,
    )


def came(params: list[Tensor], eps: float, eps2: float, **options: Any) -> Any:
    return came_pytorch.CAME(params, eps=(eps, eps2), **options)


def mini_by_rows(params: list[Tensor], **options: Any) -> Any:
    names = ("mlp" if p.ndim == 2 else "gain" for p in params)
    named = [(f"{name}.{i}", p) for i, (name, p) in enumerate(zip(names, params, strict=True))]
    return adam_mini.Adam_mini(named, verbose=False, **options)


def mini_by_heads(params: list[Tensor], blocks: int, **options: Any) -> Any:
    # It asks for the sizes of square matrices: of dim rows and columns, in n_heads pieces.
    assert blocks == 3
    named = [
        (f"{name}.{i}", p) for i, (name, p) in enumerate(zip(("wq", "wk"), params, strict=True))
    ]
    return adam_mini.Adam_mini(named, dim=12, n_heads=3, verbose=False, **options)


ORACLES = [
    Oracle(
        "came", "came-pytorch", came, (*ANY, (3, 4, 5)), {"lr": 1e-3, "eps": 1e-30, "eps2": 1e-16}
    ),
    Oracle("adam_mini", "adam-mini", mini_by_rows, ANY, {"lr": 1e-2}),
    Oracle(
        "adam_mini",
        "adam-mini",
        mini_by_heads,
        ((12, 12), (12, 12)),
        {"lr": 1e-2, "blocks": 3},
        label="heads",
        difference="ours was told the number of heads, which it takes from a model",
    ),
    Oracle(
        "adafactor",
        "pytorch-optimizer",
        adafactor,
        ANY,
        {"lr": 1e-2},
        tolerance64=1e-9,
        difference="its scale_parameter and relative_step were turned off",
    ),
    Oracle(
        "adafactor",
        "pytorch-optimizer",
        adafactor,
        ANY,
        {"lr": 1e-2, "beta1": 0.9},
        tolerance64=1e-9,
        schedule=False,
        label="beta1",
        difference="its moment holds lr: the same at a constant rate",
    ),
]
