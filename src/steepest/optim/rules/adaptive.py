"""Gradients divided by a measure of their size, beside Adam: from AdaGrad to AdaBelief."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.optim.hyperparameters import is_zero
from steepest.optim.live import Hyper
from steepest.optim.recipe import Recipe
from steepest.optim.rule import Rule, State, ema
from steepest.optim.rules.adam import TwoMoments


@dataclass(frozen=True)
class Adagrad(Rule):
    """AdaGrad (Duchi, Hazan & Singer, 2011, Figure 1, diagonal).

    s <- s + g^2;  u = g / (sqrt(s + initial_accumulator) + eps)
    """

    lr: float = 1e-2
    weight_decay: float = 0.0
    eps: float = 1e-10
    initial_accumulator: float = 0.0

    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return the sum of squares, zero: what it starts from is added where it is read."""
        return {"sum": torch.zeros_like(param)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the gradient over the root of the sum of all squares."""
        s = state["sum"] + grad * grad
        return grad / ((s + h.initial_accumulator).sqrt() + h.eps), {"sum": s}


@dataclass(frozen=True)
class AdaGradNorm(Rule):
    """AdaGrad-Norm (Ward, Wu & Bottou, 2019, arXiv:1806.01811, Algorithm 1).

    s <- s + ||G||^2, with G the gradients of all parameters together
    u = g / sqrt(s + initial_accumulator)

    One step size for the whole model, so a parameter's step depends on the others' gradients.
    Weight decay is decoupled and not seen by s.
    """

    lr: float = 1.0
    weight_decay: float = 0.0
    initial_accumulator: float = 1e-2

    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return nothing: the one sum is shared."""
        return {}

    def shared(self) -> dict[str, float]:
        """Return the sum of squares, of none."""
        return {"squares": 0.0}

    def measure(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> dict[str, Tensor]:
        """Return the sum of a gradient's squares."""
        return {"squares": (grad * grad).sum()}

    def combine(self, sums: Mapping[str, Tensor], h: Hyper) -> dict[str, Tensor]:
        """Return the sum over all steps."""
        return {"squares": h.squares + sums["squares"]}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the gradient over the norm of all gradients so far."""
        b = (h.squares + h.initial_accumulator).sqrt()
        return grad / torch.where(b == 0, 1.0, b), {}


@dataclass(frozen=True)
class RMSprop(Rule):
    """RMSProp (Tieleman & Hinton, 2012, lecture 6e), centered by Graves (2013, arXiv:1308.0850).

    v <- a v + (1 - a) g^2, with a = alpha;  c <- a c + (1 - a) g
    B <- mu B + g / (sqrt(v) + eps), or of v - c^2 in place of v with centered;  u = B

    As in torch.optim.RMSprop: no bias correction, and the learning rate outside of B. Weight decay
    is decoupled.
    """

    lr: float = 1e-2
    weight_decay: float = 0.0
    alpha: float = 0.99
    momentum: float = 0.0
    eps: float = 1e-8
    centered: bool = False

    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return the average of squares and, where they are used, that of gradients and B."""
        names = ["square_avg"]
        names += ["grad_avg"] if self.centered else []
        names += [] if is_zero(self.momentum) else ["momentum"]
        return {name: torch.zeros_like(param) for name in names}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the gradient over its root mean square, with momentum where there is any."""
        new = {"square_avg": ema(state["square_avg"], grad * grad, h.alpha)}
        variance = new["square_avg"]
        if self.centered:
            mean = new["grad_avg"] = ema(state["grad_avg"], grad, h.alpha)
            variance = (variance - mean * mean).clamp(min=0)
        u = grad / (variance.sqrt() + h.eps)
        if "momentum" in state:
            u = new["momentum"] = h.momentum * state["momentum"] + u
        return u, new


@dataclass(frozen=True)
class RAdam(TwoMoments):
    """RAdam, rectified Adam (Liu et al., 2020, arXiv:1908.03265, Algorithm 2).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    R = 2 / (1 - b2) - 1;  rho = R - 2 t b2^t / (1 - b2^t)
    r = sqrt((rho - 4) (rho - 2) R / ((R - 4) (R - 2) rho))
    u = r m / (1 - b1^t) / ((sqrt(v) + eps) / sqrt(1 - b2^t)) if rho >= 5, else m / (1 - b1^t)

    The first steps, 5 with the default b2, are by momentum alone, in the gradient's own scale. The
    paper's threshold is 4; 5, and where eps is, are the authors' code and torch's.
    """

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the factor of the direction, and whether it has a denominator."""
        return rectification(step, *values["betas"])

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the rectified direction, or the first moment where v is of too few steps."""
        m, v = self.moments(grad, state, h)
        return rectified(m, v, h), {"exp_avg": m, "exp_avg_sq": v}


def rectification(step: int, b1: float, b2: float) -> dict[str, float]:
    """Return RAdam's factor of the direction at a step, and whether (1 or 0) it divides by v."""
    limit = 2 / (1 - b2) - 1
    rho = limit - 2 * step * b2**step / (1 - b2**step)
    factor = 1 / (1 - b1**step)
    if rho < 5:
        return {"factor": factor, "adapts": 0.0}
    r = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5
    return {"factor": factor * r * (1 - b2**step) ** 0.5, "adapts": 1.0}


def rectified(m: Tensor, v: Tensor, h: Hyper) -> Tensor:
    """Return the direction of RAdam with the scalars of `rectification`."""
    direction: Tensor = h.factor * m / torch.where(h.adapts > 0, v.sqrt() + h.eps, 1.0)
    return direction


@dataclass(frozen=True)
class AdaBelief(TwoMoments):
    """AdaBelief, Adam by the gradient's deviation (Zhuang et al., 2020, arXiv:2010.07468, Alg. 2).

    m <- b1 m + (1 - b1) g;  s <- b2 s + (1 - b2) (g - m)^2 + eps
    u = m / (1 - b1^t) / (sqrt(s / (1 - b2^t)) + eps), or with rectify RAdam's u with s as v

    eps adds up in s to eps / (1 - b2), so the paper's 1e-8 is as much as 3e-3 would be in Adam. The
    default is that of the authors' package, 1e-16.
    """

    eps: float = 1e-16
    rectify: bool = False

    def init(self, param: Tensor) -> State:
        """Return the average of gradients and that of their squared deviations, zero."""
        return {"exp_avg": torch.zeros_like(param), "exp_avg_var": torch.zeros_like(param)}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return Adam's bias corrections, or RAdam's scalars."""
        if self.rectify:
            return rectification(step, *values["betas"])
        return super().scalars(step, values)

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the first moment over the root of the mean squared deviation."""
        b1, b2 = h.betas
        m = ema(state["exp_avg"], grad, b1)
        s = ema(state["exp_avg_var"], (grad - m) ** 2, b2) + h.eps
        new = {"exp_avg": m, "exp_avg_var": s}
        if self.rectify:
            return rectified(m, s, h), new
        return h.scale1 * m / (h.root_scale2 * s.sqrt() + h.eps), new


@dataclass(frozen=True)
class LaProp(TwoMoments):
    """LaProp, momentum after normalisation (Ziyin, Wang & Ueda, 2020, arXiv:2002.04839).

    v <- b2 v + (1 - b2) g^2
    m <- b1 m + (1 - b1) g / (sqrt(v / (1 - b2^t)) + eps);  u = m / (1 - b1^t)
    """

    lr: float = 4e-4
    eps: float = 1e-15

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the corrected average of normalised gradients."""
        b1, b2 = h.betas
        v = ema(state["exp_avg_sq"], grad * grad, b2)
        m = ema(state["exp_avg"], grad / (h.root_scale2 * v.sqrt() + h.eps), b1)
        return h.scale1 * m, {"exp_avg": m, "exp_avg_sq": v}


@dataclass(frozen=True)
class DiffGrad(TwoMoments):
    """diffGrad, Adam slowed where gradients do not change (Dubey et al., 2019, arXiv:1909.11015).

    f = 1 / (1 + exp(-|g - g'|)), with g' the previous gradient, 0 at first
    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    u = f m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    f is between 1/2 and 1 and depends on the gradient's scale: it is near 1/2 for every small
    gradient, as those of language models are.
    """

    def init(self, param: Tensor) -> State:
        """Return both moments and the previous gradient, zero."""
        return super().init(param) | {"previous_grad": torch.zeros_like(param)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return Adam's direction times the friction."""
        m, v = self.moments(grad, state, h)
        friction = torch.sigmoid((grad - state["previous_grad"]).abs())
        u = friction * h.scale1 * m / (h.root_scale2 * v.sqrt() + h.eps)
        return u, {"exp_avg": m, "exp_avg_sq": v, "previous_grad": grad}


RECIPES = (
    Recipe(
        "adagrad",
        Adagrad(),
        family="Adam",
        year=2011,
        paper="Duchi, Hazan & Singer, https://jmlr.org/papers/v12/duchi11a.html",
        state="4 * m * n",
        differs=(
            "torch.optim.Adagrad adds weight decay to the gradient.",
            "TensorFlow and optax start the sum from 0.1, and optax has eps inside the root.",
        ),
    ),
    Recipe(
        "adagrad_norm",
        AdaGradNorm(),
        family="Adam",
        year=2019,
        paper="Ward, Wu & Bottou, arXiv:1806.01811",
        state="0",
        differs=(
            "The authors' code (xwuShirley/pytorch) has a sum for each row of a matrix and each "
            "element of a vector, where the paper has one for all.",
        ),
    ),
    Recipe(
        "rmsprop",
        RMSprop(),
        family="Adam",
        year=2012,
        paper="Tieleman & Hinton, "
        "https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf",
        state="4 * m * n * (1 + (momentum > 0) + centered)",
        differs=(
            "torch.optim.RMSprop adds weight decay to the gradient.",
            "Graves, TensorFlow and optax have the learning rate inside the momentum buffer, and "
            "eps inside the root.",
        ),
    ),
    Recipe(
        "radam",
        RAdam(),
        family="Adam",
        year=2020,
        paper="Liu et al., arXiv:1908.03265",
        state="8 * m * n",
        differs=(
            "The authors' code and pytorch-optimizer move nothing while rho < 5 by default.",
            "torch and optimi add weight decay to the gradient by default.",
            "optax adds eps to the bias-corrected root.",
        ),
    ),
    Recipe(
        "adabelief",
        AdaBelief(),
        family="Adam",
        year=2020,
        paper="Zhuang et al., arXiv:2010.07468",
        state="8 * m * n",
        differs=(
            "adabelief-pytorch and timm rectify by default, which the paper does not.",
            "optax has two eps, one in s and one outside of the root.",
        ),
    ),
    Recipe(
        "laprop",
        LaProp(),
        family="Adam",
        year=2020,
        paper="Ziyin, Wang & Ueda, arXiv:2002.04839",
        state="8 * m * n",
        differs=(
            "The authors' code, timm and pytorch-optimizer have the learning rate inside m, which "
            "is the same while it is constant.",
            "The authors' code decays by weight_decay, not lr * weight_decay.",
            "heavyball's eps is the least value of the root, not added to it.",
        ),
    ),
    Recipe(
        "diffgrad",
        DiffGrad(),
        family="Adam",
        year=2019,
        paper="Dubey et al., arXiv:1909.11015",
        state="12 * m * n",
        differs=(
            "The authors' diffGrad.py may never see a change, as it keeps the gradient's storage "
            "and not a copy: f is then 1/2.",
            "The authors' code, torch_optimizer and pytorch-optimizer do not bias-correct the "
            "root that eps is added to.",
        ),
    ),
)
