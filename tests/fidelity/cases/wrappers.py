"""What goes around any rule."""

from __future__ import annotations

from typing import Any

import pytorch_optimizer
import torch
from harness import Case, Oracle
from torch import Tensor

from cases.kronecker import MAGNIFIED, adopt_first
from cases.sgd_sign import ANY

# Rounding wrappers act on bfloat16 parameters alone: test_bfloat16.py.

CASES = [
    Case("adamw", {"lr": 3e-3}, wrap=("cautious",)),
    Case("sgd", {"lr": 0.05}, wrap=("cautious",)),
    Case("lamb", {"lr": 3e-3}, wrap=("cautious",)),
    Case(
        "adan",
        {"lr": 3e-3},
        wrap=("cautious",),
        tolerance32=1e-3,
        reason="a sign that float32 cannot tell moves every element of the tensor, by 1 / its size",
    ),
    Case("adamw", {"lr": 3e-3}, wrap=("lookahead",)),
    Case("sgd", {"lr": 0.05, "update_interval": 4, "alpha": 0.8}, "4", wrap=("lookahead",)),
    Case(
        "soap",
        {"lr": 3e-3, "update_interval": 1000, "lookahead_update_interval": 4},
        wrap=("lookahead",),
        after=adopt_first,
        tolerance32=6e-2,
        reason=MAGNIFIED,
    ),
    Case("adamw", {"lr": 3e-3}, wrap=("growth_limiter",)),
    Case("sgd", {"lr": 0.05, "growth_limit": 1.2}, "1.2", wrap=("growth_limiter",)),
    Case("adan", {"lr": 3e-3}, wrap=("growth_limiter",)),
    Case("adamw", {"lr": 3e-3}, wrap=("adaptive_clipping",)),
    Case(
        "adamw",
        {"lr": 3e-3, "clipping": 0.1, "adaptive_clipping_eps": 1e-2},
        "0.1",
        wrap=("adaptive_clipping",),
    ),
    Case("lamb", {"lr": 3e-3}, wrap=("adaptive_clipping",)),
    Case("sgd", {"lr": 0.05}, wrap=("adaptive_clipping", "growth_limiter", "lookahead")),
]


class Looking(pytorch_optimizer.Lookahead):
    """Lookahead around torch's AdamW, as an optimizer that schedulers take."""

    def __init__(self, params: list[Tensor], update_interval: int, alpha: float, **options: Any):
        super().__init__(torch.optim.AdamW(params, **options), k=update_interval, alpha=alpha)


def cautious_lion(params: list[Tensor], **options: Any) -> Any:
    return pytorch_optimizer.Lion(params, cautious=True, **options)


ORACLES = [
    Oracle(
        "adamw",
        "pytorch-optimizer",
        Looking,
        ANY,
        {"lr": 3e-3, "update_interval": 5, "alpha": 0.8},
        wrap=("lookahead",),
    ),
    Oracle(
        "lion",
        "pytorch-optimizer",
        cautious_lion,
        ANY,
        {"lr": 1e-3},
        wrap=("cautious",),
    ),
]
