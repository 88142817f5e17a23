"""MARS: adaptive methods on gradients whose variance is reduced by those of the step before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.optim.linalg import newton_schulz
from steepest.optim.live import Hyper
from steepest.optim.recipe import HIDDEN, Part, Recipe
from steepest.optim.roles import Role
from steepest.optim.rule import Extra, Rule, State, ema, sign
from steepest.optim.rules.adam import AdamW


@dataclass(frozen=True)
class Mars(Rule):
    """Base: the corrected gradient that the three methods take in place of the gradient."""

    lr: float = 3e-3
    weight_decay: float = 0.0
    gamma: float = 0.025
    exact: bool = False

    reads_param: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Read the parameter only to remember it, as the exact form does."""
        object.__setattr__(self, "reads_param", self.exact)

    def init(self, param: Tensor) -> State:
        """Return the momentum, the previous gradient and, if exact, the previous weights, zero."""
        names = ("momentum", "previous_grad", *(["previous_param"] if self.exact else []))
        return {name: torch.zeros_like(param) for name in names}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the factor of the correction."""
        return {"factor": self.factor(step, values["momentum"], values["gamma"])}

    def factor(self, step: int, b1: float, gamma: float) -> float:
        """Return gamma b1 / (1 - b1), and 0 where the exact form has no weights to go back to."""
        return 0.0 if self.exact and step == 1 else gamma * b1 / (1 - b1)

    def extra(self) -> Extra | None:
        """Return that the exact form takes the gradient at the previous weights."""
        return "previous_weights" if self.exact else None

    def wants(self, step: int) -> bool:
        """Say whether there are previous weights."""
        return step > 1

    def observe(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the batch's gradient at the previous weights."""
        return {"previous_grad": grad}

    def corrected(
        self, grad: Tensor, param: Tensor, state: State, h: Hyper
    ) -> tuple[Tensor, State]:
        """Return c, and what the next step's c needs."""
        c = grad + h.factor * (grad - state["previous_grad"])
        kept = {"previous_param": param} if self.exact else {"previous_grad": grad}
        return c / c.norm().clamp(min=1.0), kept


@dataclass(frozen=True)
class MarsAdamW(Mars):
    """MARS-AdamW, variance-reduced AdamW (Yuan et al., 2024, arXiv:2411.10438, Algorithm 2).

    c = g + gamma b1 / (1 - b1) (g - g');  c <- c / max(1, ||c||_F)
    m <- b1 m + (1 - b1) c;  v <- b2 v + (1 - b2) c^2
    u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    g' is the gradient of the step before, 0 at the first. With `exact` it is the gradient of this
    batch at the weights before the last step, which costs a second backward pass
    (Optimizer.wants); at the first step c = g. For hidden matrices; AdamW steps the rest.
    """

    betas: tuple[float, float] = (0.95, 0.99)
    eps: float = 1e-8

    def init(self, param: Tensor) -> State:
        """Return what the correction needs, and the second moment, zero."""
        return {**super().init(param), "exp_avg_sq": torch.zeros_like(param)}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the factor of the correction, and Adam's bias corrections."""
        b1, b2 = values["betas"]
        return {
            "factor": self.factor(step, b1, values["gamma"]),
            "scale1": 1 / (1 - b1**step),
            "root_scale2": (1 - b2**step) ** -0.5,
        }

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return Adam's direction of the corrected gradient."""
        b1, b2 = h.betas
        c, kept = self.corrected(grad, param, state, h)
        m, v = ema(state["momentum"], c, b1), ema(state["exp_avg_sq"], c * c, b2)
        u = h.scale1 * m / (h.root_scale2 * v.sqrt() + h.eps)
        return u, {**kept, "momentum": m, "exp_avg_sq": v}


@dataclass(frozen=True)
class MarsLion(Mars):
    """MARS-Lion, the sign of variance-reduced momentum (Yuan et al., 2024, arXiv:2411.10438,
    Algorithm 3).

    c = g + gamma b / (1 - b) (g - g');  c <- c / max(1, ||c||_F)
    m <- b m + (1 - b) c;  u = sign(m)

    b is `momentum`; there is no second one, so it is Signum of c rather than Lion. g' and `exact`
    as in mars_adamw. The default lr is the authors' code's for all of MARS, long for a sign method.
    For hidden matrices; AdamW steps the rest.
    """

    momentum: float = 0.95

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the sign of the momentum of corrected gradients."""
        c, kept = self.corrected(grad, param, state, h)
        m = ema(state["momentum"], c, h.momentum)
        return sign(m), {**kept, "momentum": m}


@dataclass(frozen=True)
class MarsShampoo(Mars):
    """MARS-Shampoo, orthogonalised variance-reduced momentum (Yuan et al., 2024, arXiv:2411.10438,
    Algorithm 4, with the authors' code's Newton-Schulz).

    c = g + gamma b / (1 - b) (g - g');  c <- c / max(1, ||c||_F)
    m <- b m + (1 - b) c
    u = max(1, rows / columns)^(1/2) NewtonSchulz(m / (1 - b))

    b is `momentum`; g' and `exact` as in mars_adamw. The norm, the factor of shape and the division
    are the code's. `ns_dtype` is the dtype of the Newton-Schulz products. For hidden matrices, a
    tensor of more dimensions is a matrix of its first against the rest; AdamW steps what is not
    hidden.
    """

    momentum: float = 0.95
    ns_steps: int = 5
    ns_dtype: str = "bfloat16"

    least_ndim: ClassVar[int] = 2
    splits: ClassVar[bool] = True

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the orthogonalised momentum of corrected gradients."""
        c, kept = self.corrected(grad, param, state, h)
        m = ema(state["momentum"], c, h.momentum)
        x = (m / (1 - h.momentum)).flatten(1)
        u = newton_schulz(x, self.ns_steps, dtype=getattr(torch, self.ns_dtype), eps=1e-8)
        u = max(1.0, u.shape[0] / u.shape[1]) ** 0.5 * u
        return u.view_as(grad), {**kept, "momentum": m}


@dataclass(frozen=True)
class AdamWBesideMars(AdamW):
    """AdamW that, beside exact MARS, remembers the weights before its last step, too.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    """

    exact: bool = False

    def init(self, param: Tensor) -> State:
        """Return AdamW's state and, if exact, room for the weights."""
        return super().init(param) | (
            {"previous_param": torch.zeros_like(param)} if self.exact else {}
        )

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return AdamW's direction."""
        u, new = super().update(grad, param, state, h)
        return u, new | ({"previous_param": param} if self.exact else {})


REST = Part(
    "adam",
    frozenset(Role) - HIDDEN,
    AdamWBesideMars(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95)),
    follows=frozenset({"exact"}),
)
EMBEDDINGS = (
    "The authors' code gives embeddings and heads to MARS, as every tensor of two dimensions; the "
    "paper has AdamW there."
)
PAPER = "Yuan et al., arXiv:2411.10438"

RECIPES = (
    Recipe(
        "mars_adamw",
        MarsAdamW(),
        family="variance reduced",
        year=2024,
        paper=PAPER,
        state="(16 if exact else 12) * m * n",
        parts=(REST,),
        differs=(
            EMBEDDINGS,
            "The authors' exact form has g' = 0 at the first step, too.",
            "timm has c = g at the first step.",
            "heavyball's `mars` does not clip c.",
            "pytorch-optimizer adds eps before the second bias correction.",
        ),
    ),
    Recipe(
        "mars_lion",
        MarsLion(),
        family="variance reduced",
        year=2024,
        paper=PAPER,
        state="(12 if exact else 8) * m * n",
        parts=(REST,),
        differs=(
            EMBEDDINGS,
            "The authors' exact form has g' = 0 at the first step, too.",
            "timm has c = g at the first step.",
        ),
    ),
    Recipe(
        "mars_shampoo",
        MarsShampoo(),
        family="variance reduced",
        year=2024,
        paper=PAPER,
        state="(12 if exact else 8) * m * n",
        parts=(REST,),
        differs=(
            EMBEDDINGS,
            "The paper's Algorithm 4 does not clip c, and has no factor of shape.",
            "The EPFL benchmark's copy does not run.",
        ),
    ),
)
