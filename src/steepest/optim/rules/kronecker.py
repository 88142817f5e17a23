"""Preconditioners that are a Kronecker product of one factor per side of the matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.optim import linalg
from steepest.optim.live import Hyper
from steepest.optim.recipe import Recipe
from steepest.optim.rule import Rule, State, ema

SIDES = ("left", "right")


def sides(param: Tensor, longest: int) -> dict[str, int]:
    """Return the sides of a matrix that are not longer than this, with their length.

    A tensor of more dimensions is a matrix of its first against the rest; a vector has no sides.
    """
    shape = (len(param), param[0].numel()) if param.ndim > 1 else ()
    return {side: size for side, size in zip(SIDES, shape, strict=False) if size <= longest}


def grams(grad: Tensor, state: State) -> State:
    """Return G G^T and G^T G of the sides that have a factor, under the factor's name."""
    found: State = {}
    if "factor_left" in state:
        g = grad.flatten(1)
        found["factor_left"] = g @ g.mT
    if "factor_right" in state:
        g = grad.flatten(1)
        found["factor_right"] = g.mT @ g
    return found


@dataclass(frozen=True)
class SOAP(Rule):
    """SOAP, Adam in the eigenbasis of Shampoo (Vyas et al., 2024, arXiv:2409.11321, Algorithm 3).

    G' = Ql^T G Qr;  M <- b1 M + (1 - b1) G;  V <- b2 V + (1 - b2) G'^2
    u = Ql (Ql^T M Qr / (sqrt(V) + eps)) Qr^T, with Adam's bias corrections
    L <- bs L + (1 - bs) G G^T;  R <- bs R + (1 - bs) G^T G
    every `update_interval` steps Ql, Qr <- one step of orthogonal iteration on L, R

    As in the authors' implementation, the first step only sets L, R and their eigenvectors and
    moves nothing, and V's rows and columns follow the eigenvectors when those are reordered.
    A side longer than `max_precond_dim`, and every vector, is not rotated (plain Adam there).
    `shampoo_beta` (bs) is b2 unless given. A tensor of more dimensions is a matrix of its first
    against the rest.
    """

    lr: float = 3e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: float | None = None
    eps: float = 1e-8
    update_interval: int = 10
    max_precond_dim: int = 10_000

    reads_param: ClassVar[bool] = False

    def init(self, param: Tensor) -> State:
        """Return both moments and, for each rotated side, its factor and its basis, all zero."""
        state = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        for side, size in sides(param, self.max_precond_dim).items():
            state[f"factor_{side}"] = param.new_zeros(size, size)
            state[f"basis_{side}"] = param.new_zeros(size, size)
        return state

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return Adam's bias corrections, counted from the first step that moves a weight."""
        b1, b2 = values["betas"]
        moves = max(step - 1, 1)
        return {"scale1": 1 / (1 - b1**moves), "root_scale2": (1 - b2**moves) ** -0.5}

    def starts(self) -> bool:
        """The first step only finds the eigenvectors."""
        return True

    def start(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the factors after one gradient, and their eigenvectors, largest first."""
        new = self._factors(grad, state, h)
        for side in SIDES:
            if f"factor_{side}" in new:
                _, vectors = linalg.eigh(new[f"factor_{side}"])
                new[f"basis_{side}"] = vectors.flip(-1).to(grad.dtype)
        return new

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return Adam's direction in the eigenbasis, rotated back."""
        b1, b2 = h.betas
        m = ema(state["exp_avg"], grad, b1)
        rotated_grad = self._rotate(grad, state)
        v = ema(state["exp_avg_sq"], rotated_grad * rotated_grad, b2)
        rotated = self._rotate(h.scale1 * m, state) / (h.root_scale2 * v.sqrt() + h.eps)
        new = {"exp_avg": m, "exp_avg_sq": v} | self._factors(grad, state, h)
        return self._rotate(rotated, state, back=True), new

    def refreshes(self, step: int) -> bool:
        """Every `update_interval` steps that moved a weight."""
        return step > 1 and (step - 1) % self.update_interval == 0

    def refresh(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the bases after one orthogonal iteration, and V in their order."""
        new: State = {}
        v = state["exp_avg_sq"].flatten(1) if param.ndim > 1 else state["exp_avg_sq"]
        for dim, side in enumerate(SIDES):
            if f"factor_{side}" not in state:
                continue
            factor, basis = state[f"factor_{side}"], state[f"basis_{side}"]
            rayleigh = (basis * (factor @ basis)).sum(0)
            order = torch.argsort(rayleigh, descending=True)
            v = v.index_select(dim, order)
            basis = basis.index_select(1, order)
            new[f"basis_{side}"] = torch.linalg.qr(factor @ basis).Q
        return new | {"exp_avg_sq": v.view_as(param)} if new else new

    def _factors(self, grad: Tensor, state: State, h: Hyper) -> State:
        beta = h.betas[1] if self.shampoo_beta is None else h.shampoo_beta
        return {name: ema(state[name], gram, beta) for name, gram in grams(grad, state).items()}

    def _rotate(self, tensor: Tensor, state: State, *, back: bool = False) -> Tensor:
        """Return the tensor in the eigenbasis, or an eigenbasis tensor in the original one."""
        if "basis_left" not in state and "basis_right" not in state:
            return tensor
        x = tensor.flatten(1)
        if "basis_left" in state:
            basis = state["basis_left"]
            x = (basis if back else basis.mT) @ x
        if "basis_right" in state:
            basis = state["basis_right"]
            x = x @ (basis.mT if back else basis)
        return x.view_as(tensor)


RECIPES = (
    Recipe(
        "soap",
        SOAP(),
        family="Kronecker",
        year=2024,
        paper="Vyas et al., arXiv:2409.11321",
        state="8 * m * n + sum(8 * side * side for side in (m, n) if side <= max_precond_dim)",
    ),
)
