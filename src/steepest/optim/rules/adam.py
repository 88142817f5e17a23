"""Adam, and its forms with Nesterov momentum: gradients divided by a moving root mean square."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.optim.live import Hyper
from steepest.optim.recipe import Part, Recipe
from steepest.optim.roles import Role
from steepest.optim.rule import Rule, State, ema


@dataclass(frozen=True)
class TwoMoments(Rule):
    """Base of rules that keep moving averages of the gradient and of its square."""

    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return both moments, zero."""
        return {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the factors that undo the bias of both moments."""
        b1, b2 = values["betas"]
        return {"scale1": 1 / (1 - b1**step), "root_scale2": (1 - b2**step) ** -0.5}

    def moments(self, grad: Tensor, state: State, h: Hyper) -> tuple[Tensor, Tensor]:
        """Return both moments after this gradient."""
        b1, b2 = h.betas
        return ema(state["exp_avg"], grad, b1), ema(state["exp_avg_sq"], grad * grad, b2)


@dataclass(frozen=True)
class DecayInside(Rule):
    """Base of rules whose weight decay is part of the direction."""

    def apply(self, param: Tensor, direction: Tensor, h: Hyper) -> Tensor:
        """Return the parameter after a step; decay is in the direction."""
        moved: Tensor = param - h.lr * direction
        return moved


@dataclass(frozen=True)
class L2(DecayInside):
    """Base of rules whose weight decay is an L2 penalty: its gradient is added to g."""

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return what the other base does with the gradient of loss and penalty."""
        return super().update(grad + h.weight_decay * param, param, state, h)


@dataclass(frozen=True)
class AdamW(TwoMoments):
    """AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101, Algorithm 2).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    With amsgrad (Reddi et al., 2018, arXiv:1904.09237) u has the largest v so far in place of v.
    """

    weight_decay: float = 0.01
    amsgrad: bool = False

    def init(self, param: Tensor) -> State:
        """Return both moments, and the largest second one with amsgrad, all zero."""
        largest = {"max_exp_avg_sq": torch.zeros_like(param)} if self.amsgrad else {}
        return super().init(param) | largest

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the corrected first moment over the root of the corrected second."""
        m, v = self.moments(grad, state, h)
        new = {"exp_avg": m, "exp_avg_sq": v}
        if self.amsgrad:
            v = new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
        return h.scale1 * m / (h.root_scale2 * v.sqrt() + h.eps), new


@dataclass(frozen=True)
class Adam(L2, AdamW):
    """Adam (Kingma & Ba, 2015, arXiv:1412.6980, Algorithm 1), weight decay as an L2 penalty.

    g <- g + wd w
    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    With amsgrad (Reddi et al., 2018, arXiv:1904.09237) u has the largest v so far in place of v.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0


@dataclass(frozen=True)
class NAdamW(TwoMoments):
    """NAdamW, Adam with Nesterov momentum (Dozat, 2016) and decoupled weight decay.

    mu_t = b1 (1 - 0.96^(t momentum_decay) / 2), or b1 where momentum_decay is 0
    P_t = mu_1 mu_2 ... mu_t
    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    n = mu_(t+1) m / (1 - P_(t+1)) + (1 - mu_t) g / (1 - P_t)
    u = n / (sqrt(v / (1 - b2^t)) + eps)

    mu grows from b1 / 2 to b1 in some 100 / momentum_decay steps. As everywhere in use, m averages
    with b1 where Dozat has mu_t.
    """

    lr: float = 2e-3
    weight_decay: float = 0.01
    momentum_decay: float = 4e-3

    def memory(self) -> dict[str, float]:
        """Return the product of the momenta so far, of none."""
        return {"mu_product": 1.0}

    def remember(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the product with this step's momentum."""
        return {"mu_product": values["mu_product"] * _mu(step, values)}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the weights of the moment and of the gradient, and what corrects the second."""
        now, ahead, product = _mu(step, values), _mu(step + 1, values), values["mu_product"]
        return {
            "moment_weight": ahead / (1 - product * ahead),
            "grad_weight": (1 - now) / (1 - product),
            "root_scale2": super().scalars(step, values)["root_scale2"],
        }

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the momentum one step ahead over the root of the corrected second moment."""
        m, v = self.moments(grad, state, h)
        ahead = h.moment_weight * m + h.grad_weight * grad
        return ahead / (h.root_scale2 * v.sqrt() + h.eps), {"exp_avg": m, "exp_avg_sq": v}


def _mu(step: int, values: Mapping[str, Any]) -> float:
    """Return the momentum that NAdam's schedule has at a step."""
    b1, decay = values["betas"][0], values["momentum_decay"]
    mu: float = b1 * (1 - 0.5 * 0.96 ** (step * decay)) if decay else b1
    return mu


@dataclass(frozen=True)
class NAdam(L2, NAdamW):
    """NAdam, Adam with Nesterov momentum (Dozat, 2016), weight decay as an L2 penalty.

    g <- g + wd w
    mu_t = b1 (1 - 0.96^(t momentum_decay) / 2), or b1 where momentum_decay is 0
    P_t = mu_1 mu_2 ... mu_t
    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    n = mu_(t+1) m / (1 - P_(t+1)) + (1 - mu_t) g / (1 - P_t)
    u = n / (sqrt(v / (1 - b2^t)) + eps)

    mu grows from b1 / 2 to b1 in some 100 / momentum_decay steps. As everywhere in use, m averages
    with b1 where Dozat has mu_t.
    """

    lr: float = 2e-3
    weight_decay: float = 0.0


def adam_for_the_rest(mine: frozenset[Role], rule: AdamW | None = None) -> Part:
    """Return the part that steps the roles beside `mine` by AdamW, as `adam_...`."""
    return Part("adam", frozenset(Role) - mine, rule or AdamW())


AMSGRAD_DIFFERS = (
    "Reddi et al. have no bias corrections in AMSGrad; torch has them, as here.",
    "optax's AMSGrad takes the maximum of the corrected second moment.",
)
TORCH_NADAM = "torch.optim.NAdam takes momentum_decay 0 as the formula's value, mu = b1 / 2."

RECIPES = (
    Recipe(
        "adam",
        Adam(),
        family="Adam",
        year=2015,
        paper="Kingma & Ba, arXiv:1412.6980",
        state="(12 if amsgrad else 8) * m * n",
        differs=AMSGRAD_DIFFERS,
    ),
    Recipe(
        "adamw",
        AdamW(),
        family="Adam",
        year=2019,
        paper="Loshchilov & Hutter, arXiv:1711.05101",
        state="(12 if amsgrad else 8) * m * n",
        differs=AMSGRAD_DIFFERS,
    ),
    Recipe(
        "nadam",
        NAdam(),
        family="Adam",
        year=2016,
        paper="Dozat, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ",
        state="8 * m * n",
        differs=(
            TORCH_NADAM,
            "Dozat's first moment averages with mu_t, and his second has one more factor b2.",
        ),
    ),
    Recipe(
        "nadamw",
        NAdamW(),
        family="Adam",
        year=2019,
        paper="Dozat, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ; decay arXiv:1711.05101",
        state="8 * m * n",
        differs=(
            TORCH_NADAM,
            "optax.nadamw has no schedule of the momentum: momentum_decay 0 here.",
            "AlgoPerf and timm correct both terms of n by 1 - b1^t: a first step of 1.9 lr where "
            "optax's and ours without a schedule are 1.47 lr.",
        ),
    ),
)
