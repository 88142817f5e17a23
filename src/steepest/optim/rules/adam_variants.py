"""Variants of Adam by element: differences, older squares, slow momentum, cross corrections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.optim.live import Hyper
from steepest.optim.recipe import Recipe
from steepest.optim.rule import Rule, State, ema
from steepest.optim.rules.adam import TwoMoments


@dataclass(frozen=True)
class Adan(Rule):
    """Adan, Nesterov momentum by differences (Xie et al., 2022, arXiv:2208.06677, Algorithm 1).

    d = g - g', with g' the previous gradient;  d = 0 at the first step
    m <- b1 m + (1 - b1) g;  q <- b2 q + (1 - b2) d;  n <- b3 n + (1 - b3) (g + b2 d)^2
    u = (m / (1 - b1^t) + b2 q / (1 - b2^t)) / (sqrt(n / (1 - b3^t)) + eps)
    w <- (w - lr u) / (1 + lr wd)

    The betas are the authors' code's, one minus the paper's; so are the bias corrections, where the
    paper starts the averages from the first gradients.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99)
    eps: float = 1e-8

    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return the three averages and the previous gradient, zero."""
        names = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad")
        return {name: torch.zeros_like(param) for name in names}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the bias corrections, and whether (1 or 0) there is a previous gradient."""
        b1, b2, b3 = values["betas"]
        return {
            "scale1": 1 / (1 - b1**step),
            "scale2": b2 / (1 - b2**step),
            "root_scale3": (1 - b3**step) ** -0.5,
            "differs": float(step > 1),
        }

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the momentum and its change over the root of the squares."""
        b1, b2, b3 = h.betas
        d = h.differs * (grad - state["previous_grad"])
        m = ema(state["exp_avg"], grad, b1)
        q = ema(state["exp_avg_diff"], d, b2)
        n = ema(state["exp_avg_sq"], (grad + b2 * d) ** 2, b3)
        u = (h.scale1 * m + h.scale2 * q) / (h.root_scale3 * n.sqrt() + h.eps)
        return u, {"exp_avg": m, "exp_avg_diff": q, "exp_avg_sq": n, "previous_grad": grad}

    def apply(self, param: Tensor, direction: Tensor, h: Hyper) -> Tensor:
        """Return the parameter after a step, then shrunk: proximal decay."""
        moved: Tensor = (param - h.lr * direction) / (1 + h.lr * h.weight_decay)
        return moved


@dataclass(frozen=True)
class ADOPT(TwoMoments):
    """ADOPT, Adam divided by older squares (Taniguchi et al., 2024, arXiv:2411.02853, revised).

    c = (t - 1)^(1/4)
    m <- b1 m + (1 - b1) clip(g / max(sqrt(v), eps), -c, c);  u = m
    then v <- b2 v + (1 - b2) g^2

    v is that of the gradients before, so it does not depend on g. The first step moves nothing, by
    decay neither: v = g^2. No bias corrections. The clip is of the paper's revision.
    """

    betas: tuple[float, float] = (0.9, 0.9999)
    eps: float = 1e-6

    def starts(self) -> bool:
        """Say that the first gradient moves nothing."""
        return True

    def start(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the first square."""
        return {"exp_avg_sq": grad * grad}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the largest magnitude of a normalised gradient."""
        return {"limit": (step - 1) ** 0.25}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the average of gradients over the root of the squares before them."""
        b1, b2 = h.betas
        v = state["exp_avg_sq"]
        normalised = (grad / v.sqrt().clamp(min=h.eps)).clamp(-h.limit, h.limit)
        m = ema(state["exp_avg"], normalised, b1)
        return m, {"exp_avg": m, "exp_avg_sq": ema(v, grad * grad, b2)}


@dataclass(frozen=True)
class AdEMAMix(Rule):
    """AdEMAMix, Adam with a second, slow momentum (Pagliardini et al., 2024, arXiv:2409.03137,
    Algorithm 1).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  s <- b3_t s + (1 - b3_t) g
    u = (m / (1 - b1^t) + alpha_t s) / (sqrt(v / (1 - b2^t)) + eps)

    alpha_t grows in proportion to t up to alpha in `alpha_warmup` steps, and the half-life of s
    from that of b1 to that of b3 in `beta3_warmup` steps; None: both have their values from the
    start. The paper's warm-ups are as long as the training; without them it can diverge early.
    alpha 2 is the default of the authors' code.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    eps: float = 1e-8
    alpha: float = 2.0
    alpha_warmup: int | None = None
    beta3_warmup: int | None = None

    elementwise: ClassVar[bool] = True
    total_steps: ClassVar[frozenset[str]] = frozenset({"alpha_warmup", "beta3_warmup"})

    def init(self, param: Tensor) -> State:
        """Return the fast and the slow average and that of squares, zero."""
        names = ("exp_avg", "exp_avg_slow", "exp_avg_sq")
        return {name: torch.zeros_like(param) for name in names}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the bias corrections, and what the warm-ups give at this step."""
        b1, b2, b3 = values["betas"]
        alpha_part, part = (
            1.0 if warmup is None else min(1.0, step / warmup)
            for warmup in (self.alpha_warmup, self.beta3_warmup)
        )
        life = (1 - part) * _half_life(b1) + part * _half_life(b3)
        return {
            "scale1": 1 / (1 - b1**step),
            "root_scale2": (1 - b2**step) ** -0.5,
            "alpha_now": alpha_part * values["alpha"],
            "beta3_now": 0.5 ** (1 / life) if life else 0.0,
        }

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return both momenta over the root of the squares."""
        m = ema(state["exp_avg"], grad, h.betas[0])
        v = ema(state["exp_avg_sq"], grad * grad, h.betas[1])
        s = ema(state["exp_avg_slow"], grad, h.beta3_now)
        u = (h.scale1 * m + h.alpha_now * s) / (h.root_scale2 * v.sqrt() + h.eps)
        return u, {"exp_avg": m, "exp_avg_slow": s, "exp_avg_sq": v}


def _half_life(beta: float) -> float:
    """Return after how many steps an average has forgotten half of a gradient."""
    return math.log(0.5) / math.log(beta) if beta else 0.0


@dataclass(frozen=True)
class EXAdam(TwoMoments):
    """EXAdam, Adam with cross-corrected moments (Adly, 2024, arXiv:2412.20302v2, Algorithm 1).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    d1 = 1 + b2^t v / (v + eps);  d2 = 1 + b1^t m^2 / (m^2 + eps)
    u = d1 (m + g) / (1 - b1^t) / (sqrt(d2 v / (1 - b2^t)) + eps)

    The gradient beside m is whole: where gradients do not change, a step is 2 lr. Version 1 of the
    paper also had a learning rate that grows with time.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the bias corrections, and the weights of the cross corrections."""
        b1, b2 = values["betas"]
        return {**super().scalars(step, values), "fade1": b1**step, "fade2": b2**step}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return momentum and gradient over the root of squares, each corrected by the other."""
        m, v = self.moments(grad, state, h)
        d1 = 1 + h.fade2 * v / (v + h.eps)
        d2 = 1 + h.fade1 * m * m / (m * m + h.eps)
        u = h.scale1 * d1 * (m + grad) / (h.root_scale2 * (d2 * v).sqrt() + h.eps)
        return u, {"exp_avg": m, "exp_avg_sq": v}


RECIPES = (
    Recipe(
        "adan",
        Adan(),
        family="Adam",
        year=2022,
        paper="Xie et al., arXiv:2208.06677",
        state="16 * m * n",
        differs=(
            "optax multiplies the difference's average by 1 - b2 where paper and code have b2.",
            "adan-pytorch (lucidrains) computes other directions.",
        ),
    ),
    Recipe(
        "adopt",
        ADOPT(),
        family="Adam",
        year=2024,
        paper="Taniguchi et al., arXiv:2411.02853",
        state="8 * m * n",
        differs=(
            "heavyball does not clip, as the paper's first version.",
            "pytorch-optimizer clips at t^(1/4) and decays at the first step.",
            "timm clips at (t - 1)^0.333 by default.",
        ),
    ),
    Recipe(
        "ademamix",
        AdEMAMix(),
        family="Adam",
        year=2024,
        paper="Pagliardini et al., arXiv:2409.03137",
        state="12 * m * n",
        differs=(
            "The authors' code adds 1e-8 to the betas in the warm-up's logarithms.",
            "pytorch-optimizer has one warm-up for alpha and b3, and alpha 5 by default.",
        ),
    ),
    Recipe(
        "exadam",
        EXAdam(),
        family="Adam",
        year=2024,
        paper="Adly, arXiv:2412.20302",
        state="8 * m * n",
    ),
)
