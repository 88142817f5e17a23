"""Shampoo: roots of the second moments of a matrix's rows and columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.optim import linalg
from steepest.optim.live import Hyper
from steepest.optim.recipe import Recipe
from steepest.optim.rule import Rule, State, ema, one_of
from steepest.optim.rules.kronecker import SIDES, grams, sides


@dataclass(frozen=True)
class Shampoo(Rule):
    """Shampoo (Gupta, Koren & Singer, 2018, arXiv:1802.09568; Shi et al., 2023, arXiv:2309.06497).

    m <- b1 m + (1 - b1) G;  M = m / (1 - b1^t)
    L <- b L + (1 - b) G G^T;  R <- b R + (1 - b) G^T G, both divided by 1 - b^t before the roots
    P = (L + eps I)^-e M (R + eps I)^-e;  u = P |D| / |P|

    D is Adam's direction (grafting "adam"), M ("sgd"), or u = P ("none"); b is `shampoo_beta`, b2
    unless given; accumulate "sum" is L <- L + G G^T, never divided. e is `exponent`, 1/4 unless
    given, and 1/2 where only one side has a factor: one longer than `max_precond_dim` has none.
    The roots are found at step `start_preconditioning_step` (`update_interval` unless given) and at
    every later multiple of `update_interval`, in float64; before that u = D. Vectors, and matrices
    of two long sides, have u = D; with "none" u = M / sqrt(v + eps), v the average, or sum, of
    squares. A tensor of more dimensions is a matrix of its first against the rest.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    shampoo_beta: float | None = None
    eps: float = 1e-12
    exponent: float | None = None
    accumulate: str = one_of("ema", "sum")
    grafting: str = one_of("adam", "sgd", "none")
    graft_eps: float = 1e-8
    update_interval: int = 100
    start_preconditioning_step: int | None = None
    max_precond_dim: int = 8192

    reads_param: ClassVar[bool] = False

    def init(self, param: Tensor) -> State:
        """Return the moments, the factors, zero, and their roots, of no effect."""
        state = {"exp_avg": torch.zeros_like(param)}
        factored = sides(param, self.max_precond_dim)
        for side, size in factored.items():
            state[f"factor_{side}"] = param.new_zeros(size, size)
            state[f"root_{side}"] = torch.diag_embed(param.new_ones(size))
        if self.grafting == "adam" or (self.grafting == "none" and not factored):
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return what corrects the bias of each average, and whether (1 or 0) there are roots."""
        b1, b2 = values["betas"]
        beta = b2 if self.shampoo_beta is None else values["shampoo_beta"]
        return {
            "scale1": 1 / (1 - b1**step),
            "root_scale2": (1 - b2**step) ** -0.5,
            "factor_scale": 1.0 if self.accumulate == "sum" else 1 / (1 - beta**step),
            "started": float(step >= self._first()),
        }

    def prepares(self, step: int) -> bool:
        """At the first step with roots, and then at every multiple of the interval."""
        first = self._first()
        return step == first or (step > first and step % self.update_interval == 0)

    def prepare(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the inverse roots of the factors after this gradient."""
        factors = self._factors(grad, state, h)
        exponent = 1 / (2 * max(len(factors), 1)) if self.exponent is None else h.exponent
        new: State = {}
        for name, factor in factors.items():
            values, vectors = linalg.eigh(h.factor_scale * factor)
            values = values - values[0].clamp(max=0) + h.eps
            root = (vectors * values**-exponent) @ vectors.mT
            new[name.replace("factor", "root")] = root.to(grad.dtype)
        return new

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the preconditioned moment, as long as the direction it is grafted on."""
        m = ema(state["exp_avg"], grad, h.betas[0])
        corrected = h.scale1 * m
        new = {"exp_avg": m} | self._factors(grad, state, h)
        graft = corrected
        if self.grafting == "adam":
            v = new["exp_avg_sq"] = ema(state["exp_avg_sq"], grad * grad, h.betas[1])
            graft = corrected / (h.root_scale2 * v.sqrt() + h.graft_eps)
        elif "exp_avg_sq" in state:
            v = new["exp_avg_sq"] = self._accumulated(state["exp_avg_sq"], grad * grad, h)
            return corrected / (h.factor_scale * v + h.eps).sqrt(), new
        p = _rooted(corrected, state)
        if p is None:
            return graft, new
        if self.grafting == "none":
            return p, new
        u = p * (graft.norm() / (p.norm() + 1e-16))
        return torch.where(h.started > 0, u, graft), new

    def _first(self) -> int:
        first = self.start_preconditioning_step
        return self.update_interval if first is None else first

    def _factors(self, grad: Tensor, state: State, h: Hyper) -> State:
        return {
            name: self._accumulated(state[name], gram, h)
            for name, gram in grams(grad, state).items()
        }

    def _accumulated(self, total: Tensor, new: Tensor, h: Hyper) -> Tensor:
        if self.accumulate == "sum":
            return total + new
        return ema(total, new, h.betas[1] if self.shampoo_beta is None else h.shampoo_beta)


def _rooted(tensor: Tensor, state: State) -> Tensor | None:
    """Return a tensor between the roots, None if there are none."""
    left, right = (state.get(f"root_{side}") for side in SIDES)
    if left is None and right is None:
        return None
    x = tensor.flatten(1)
    x = x if left is None else left @ x
    x = x if right is None else x @ right
    return x.view_as(tensor)


RECIPES = (
    Recipe(
        "shampoo",
        Shampoo(),
        family="Kronecker",
        year=2018,
        paper="Gupta, Koren & Singer, arXiv:1802.09568; Shi et al., arXiv:2309.06497",
        state="4 * m * n + sum(8 * side * side for side in (m, n) if side <= max_precond_dim)"
        " + (4 * m * n if grafting == 'adam' or (grafting == 'none' and min(m, n) >"
        " max_precond_dim) else 0)",
        differs=(
            "Meta's distributed Shampoo cuts a side longer than max_precond_dim in blocks; here it "
            "has no factor.",
            "torch_optimizer's exponent is 1/2 for a matrix, and its right factor is that of the "
            "gradient which the left one has preconditioned.",
            "pytorch_optimizer's ScalableShampoo, after Google's, grafts the gradient and not its "
            "average, and has heavy-ball momentum after that.",
            "The Shampoo of OpenRaiser/scaling-for-scaling is Newton-Schulz of Adam's direction: "
            "ortho_adam here.",
        ),
    ),
)
