"""Orthogonalised momentum."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_optimizer
import torch
from harness import Case, Oracle
from muon import SingleDeviceMuon
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
from torch import Tensor

from cases.sgd_sign import MATRICES

MAGNIFIED = "it magnifies small singular values thousands of times, and their rounding errors"

CASES = [
    Case("muon", {"lr": 0.02}),
    Case("muon", {"lr": 0.02, "momentum": 0.9, "nesterov": False, "ns_steps": 4}, "plain"),
    Case("muon", {"lr": 0.02, "coefficients": "polar_express"}, "polar express"),
    Case(
        "muon",
        {"coefficients": "polar_express", "ns_steps": 9},
        "polar express 9",
        tolerance32=1e-4,
        reason=MAGNIFIED,
    ),
    Case("d_muon", {"lr": 3e-3}),
    Case("d_muon", {"lr": 3e-3, "nesterov": False, "momentum": 0.8, "ns_steps": 6}, "plain"),
    Case("normuon", {"lr": 3e-3}),
    Case(
        "normuon",
        {"lr": 0.02, "nesterov": True, "scale": "norm", "beta2": 0.8, "eps": 1e-2},
        "authors' code",
    ),
    Case("ortho_adam", {"lr": 3e-3}),
    Case("ortho_adam", {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-4, "ns_steps": 4}, "0.8 0.95"),
    Case("mudam", {"lr": 8e-3}, tolerance32=1e-4, reason=MAGNIFIED),
    Case(
        "mudam",
        {"lr": 8e-3, "momentum": 0.8, "shampoo_beta": 0.9, "nesterov": False, "eps": 1e-3},
        "plain",
        tolerance32=1e-4,
        reason=MAGNIFIED,
    ),
    Case(
        "mudam",
        {"lr": 8e-3, "reorthogonalise": True, "ns_steps": 4},
        "reorthogonalised",
        tolerance32=1e-4,
        reason=MAGNIFIED,
    ),
]


@contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """Keep products in a dtype that implementations round to bfloat16."""
    cast, defaults = Tensor.bfloat16, zero_power_via_newton_schulz_5.__defaults__
    exact = tuple(dtype if value is torch.bfloat16 else value for value in defaults)
    Tensor.bfloat16 = lambda self: self.to(dtype, copy=True)
    zero_power_via_newton_schulz_5.__defaults__ = exact
    try:
        yield
    finally:
        Tensor.bfloat16 = cast
        zero_power_via_newton_schulz_5.__defaults__ = defaults


def exact(kind: type[torch.optim.Optimizer], **fixed: Any) -> Callable[..., torch.optim.Optimizer]:
    """Return an optimizer whose Newton-Schulz products have the dtype of its parameters."""

    class Exact(kind):  # type: ignore[misc,valid-type]
        def step(self, closure: Any = None) -> None:
            with products_in(self.param_groups[0]["params"][0].dtype):
                super().step()

    return functools.partial(Exact, **fixed)


def kozistr(kind: type[torch.optim.Optimizer], **fixed: Any) -> Callable[..., Any]:
    def make(params: list[Tensor], scale: str = "", **options: Any) -> torch.optim.Optimizer:
        groups = [{"params": params, "use_muon": True}]
        return exact(kind, foreach=False, **fixed)(groups, **options)

    return make


def rounded(params: list[Tensor], ns_dtype: str, **options: Any) -> torch.optim.Optimizer:
    assert ns_dtype == "bfloat16"
    return torch.optim.Muon(params, **options)


KEPT = "its bfloat16 products were kept in the dtype of the parameters"
# Where eps is added to the norm or bounds it, or the buffer is a sum of gradients or their average.
EPS = f"{KEPT}; its eps is not added to the norm"

ORACLES = [
    Oracle(
        "muon",
        "torch",
        rounded,
        MATRICES,
        {"lr": 0.02, "ns_dtype": "bfloat16"},
        tolerance32=5e-2,
        tolerance64=5e-2,
        role="hidden",
        label="bfloat16",
        difference="its products are bfloat16 in another order",
    ),
    Oracle(
        "muon",
        "muon-optimizer",
        exact(SingleDeviceMuon),
        MATRICES,
        {"lr": 0.02},
        role="hidden",
        difference=KEPT,
    ),
    Oracle(
        "muon",
        "pytorch-optimizer",
        kozistr(pytorch_optimizer.Muon),
        MATRICES,
        {"lr": 0.02, "momentum": 0.9, "nesterov": False, "ns_steps": 4},
        tolerance64=1e-5,
        role="hidden",
        label="plain",
        difference=EPS,
    ),
    Oracle(
        "d_muon",
        "torch",
        exact(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"),
        MATRICES,
        {"lr": 3e-3},
        tolerance64=1e-5,
        role="hidden",
        difference=EPS,
    ),
    Oracle(
        "normuon",
        "pytorch-optimizer",
        kozistr(pytorch_optimizer.NorMuon, update_scale="match_rms"),
        MATRICES,
        {"lr": 3e-3, "nesterov": True},
        tolerance64=1e-5,
        role="hidden",
        difference=EPS,
    ),
    Oracle(
        "normuon",
        "pytorch-optimizer",
        kozistr(pytorch_optimizer.NorMuon),
        MATRICES,
        {"lr": 0.02, "nesterov": True, "scale": "norm"},
        tolerance64=1e-5,
        role="hidden",
        label="norm",
        difference=EPS,
    ),
]
