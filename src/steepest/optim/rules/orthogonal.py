"""Orthogonalised momentum: every singular value of the update is made about one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.errors import UserError
from steepest.optim.linalg import newton_schulz, polynomials, quintic
from steepest.optim.live import Hyper
from steepest.optim.recipe import HIDDEN, Part, Recipe
from steepest.optim.roles import Role
from steepest.optim.rule import Rule, State, ema, one_of
from steepest.optim.rules.adam import AdamW, adam_for_the_rest


@dataclass(frozen=True)
class Muon(Rule):
    """Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon).

    m <- mu m + (1 - mu) g;  x = mu m + (1 - mu) g with nesterov, else m
    u = max(1, rows / columns)^(1/2) NewtonSchulz(x)

    For hidden matrices; a tensor of more dimensions is a matrix of its first against the rest.
    `coefficients` "jordan" is one polynomial for all steps, "polar_express" the best one for each
    (Amsel et al., 2025, arXiv:2505.16932). `ns_dtype` is the dtype of the Newton-Schulz products.
    """

    lr: float = 0.02
    weight_decay: float = 0.0
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    coefficients: str = one_of("jordan", "polar_express")
    ns_dtype: str = "bfloat16"

    reads_param: ClassVar[bool] = False
    least_ndim: ClassVar[int] = 2
    splits: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return the gradient's moving average, zero."""
        return {"momentum": torch.zeros_like(param)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the orthogonalised momentum."""
        m, u = self._orthogonal(grad, state, h)
        scale = max(1.0, u.shape[0] / u.shape[1]) ** 0.5
        return (scale * u).view_as(grad), {"momentum": m}

    def _orthogonal(self, grad: Tensor, state: State, h: Hyper) -> tuple[Tensor, Tensor]:
        """Return the new moving average, and the orthogonal matrix near it."""
        m = ema(state["momentum"], grad, h.momentum)
        return m, self._newton_schulz(ema(grad, m, 1 - h.momentum) if self.nesterov else m)

    def _newton_schulz(self, x: Tensor) -> Tensor:
        dtype = getattr(torch, self.ns_dtype)
        return newton_schulz(x.flatten(1), self.ns_steps, self.coefficients, dtype)


@dataclass(frozen=True)
class DMuon(Muon):
    """Muon at the scale of AdamW's updates, Moonlight (Liu et al., 2025, arXiv:2502.16982).

    m <- mu m + g;  x = g + mu m with nesterov, else m
    u = 0.2 max(rows, columns)^(1/2) NewtonSchulz(x)

    The elements of u have a root mean square of about 0.2, as AdamW's, so that one lr and one
    weight decay serve hidden matrices and the AdamW of the rest: `adam_lr` and `adam_weight_decay`
    follow `lr` and `weight_decay` unless given. Nesterov is in the authors' code, not in the
    paper's equations.
    """

    lr: float = 1e-3
    weight_decay: float = 0.1

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the orthogonalised momentum with elements of about 0.2."""
        m = h.momentum * state["momentum"] + grad
        u = self._newton_schulz(grad + h.momentum * m if self.nesterov else m)
        return (0.2 * max(u.shape) ** 0.5 * u).view_as(grad), {"momentum": m}


@dataclass(frozen=True)
class NorMuon(Muon):
    """NorMuon, Muon with a second moment per neuron (Li et al., 2025, arXiv:2510.05491, Alg. 1).

    m <- mu m + (1 - mu) g;  o = NewtonSchulz(m)
    v <- b2 v + (1 - b2) (row means of o^2);  y = rows of o / (sqrt(v) + eps)
    u = 0.2 (rows columns)^(1/2) y / ||y||_F

    `scale` "rms" is that: the elements of u have a root mean square of 0.2. "norm", with nesterov
    (x of Muon in place of m), is the authors' code: u = max(1, rows / columns)^(1/2) ||o||_F y /
    ||y||_F, which takes Muon's lr.
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    nesterov: bool = False
    beta2: float = 0.95
    eps: float = 1e-10
    scale: str = one_of("rms", "norm")

    def init(self, param: Tensor) -> State:
        """Return the gradient's moving average, and the mean square of each row, zero."""
        return {**super().init(param), "row_sq": param.new_zeros(param.shape[0])}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the orthogonalised momentum with rows of equal size."""
        m, o = self._orthogonal(grad, state, h)
        v = ema(state["row_sq"], (o * o).mean(1), h.beta2)
        y = o / (v.sqrt() + h.eps).unsqueeze(1)
        rows, columns = o.shape
        kept = max(1.0, rows / columns) ** 0.5 * o.norm()
        size = 0.2 * (rows * columns) ** 0.5 if self.scale == "rms" else kept
        return (size * (y / (y.norm() + h.eps))).view_as(grad), {"momentum": m, "row_sq": v}


@dataclass(frozen=True)
class OrthoAdam(AdamW):
    """Adam's direction, orthogonalised: what one public benchmark runs as "shampoo" (no paper).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    x = m / (sqrt(v / (1 - b2^t)) + eps)
    u = NewtonSchulz(x) / (1 - b1^t) for matrices, x / (1 - b1^t) (Adam) for vectors

    For every matrix, embedding and head too, with no factor for their shape. Newton-Schulz forgets
    the size of m, so that the bias correction outside it makes the first steps of matrices long:
    ten times at t = 1.
    """

    lr: float = 1e-2
    weight_decay: float = 0.0
    ns_steps: int = 5
    ns_dtype: str = "bfloat16"

    elementwise: ClassVar[bool] = False
    reads_param: ClassVar[bool] = False
    splits: ClassVar[bool] = True

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return Adam's direction, of matrices the orthogonal one near it."""
        direction, new = super().update(grad, param, state, h)
        if grad.ndim < 2:
            return direction, new
        x = (direction / h.scale1).flatten(1)
        u = newton_schulz(x, self.ns_steps, dtype=getattr(torch, self.ns_dtype))
        return (h.scale1 * u).view_as(grad), new


@dataclass(frozen=True)
class Mudam(Rule):
    """Mudam, one-sided Shampoo by a joint Newton-Schulz iteration (Wen et al., 2025,
    arXiv:2509.02046; defined by the sweep's code in marin-community/marin).

    m <- b1 m + g;  n = (1 - b1) (g + b1 m) / (1 - b1^(t+1)), or (1 - b1) m / (1 - b1^t)
    H <- b2 H + g^T g;  D = (1 - b2) H / (1 - b2^t)
    x = n^T / k;  P = D - x x^T;  f^2 = ||P||_F + ||x||_F^2 + eps
    x <- x / f;  P <- (P + eps I) / f^2
    `ns_steps` times: W = a + b A + c A^2 with A = x x^T + P;  x <- W x;  P <- W P W
    u = max(rows, columns)^(1/2) k x^T, about max(rows, columns)^(1/2) n D^(-1/2)

    k, which makes P positive, is a function of both decays (b1 is momentum, b2 shampoo_beta) and
    needs b2 > b1^2. eps is on the scale of squared gradients. H is columns x columns, however many
    there are. `reorthogonalise` puts u through Newton-Schulz once more. Products are of float32:
    rounded to bfloat16 P has negative eigenvalues, and the iteration diverges.
    """

    lr: float = 8e-3
    weight_decay: float = 0.2
    momentum: float = 0.95
    shampoo_beta: float = 0.95
    eps: float = 1e-5
    nesterov: bool = True
    ns_steps: int = 5
    reorthogonalise: bool = False

    reads_param: ClassVar[bool] = False
    least_ndim: ClassVar[int] = 2
    splits: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return the momentum and the factor of the columns, zero."""
        columns = param.flatten(1).shape[1]
        return {
            "momentum": torch.zeros_like(param),
            "factor": param.new_zeros(columns, columns),
        }

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return both bias corrections and k, by which the momentum is bounded by the factor."""
        b1, b2 = values["momentum"], values["shampoo_beta"]
        if b2 <= b1 * b1:
            raise UserError(
                f"mudam needs shampoo_beta above momentum^2 = {b1 * b1:g}, but it is {b2:g}."
            )
        seen, bound = step, 1 / (1 - b1 * b1 / b2)
        if self.nesterov:
            seen, bound = step + 1, (1 + b1) ** 2 + b1**4 * bound
        return {
            "scale1": (1 - b1) / (1 - b1**seen),
            "scale2": (1 - b2) / (1 - b2**step),
            "k": (1 - b1) * (bound / (1 - b2)) ** 0.5,
        }

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the momentum times the inverse root of the factor."""
        g = grad.flatten(1)
        m = h.momentum * state["momentum"] + grad
        n = (grad + h.momentum * m if self.nesterov else m).flatten(1)
        factor = h.shampoo_beta * state["factor"] + g.mT @ g
        x = h.scale1 / h.k * n.mT
        p = h.scale2 * factor - x @ x.mT
        size = (p.norm() + x.norm() ** 2 + h.eps).sqrt()
        u = h.k * self._iterate(x / size, p / size / size, h.eps / size / size).mT
        if self.reorthogonalise:
            u = newton_schulz(u, self.ns_steps, dtype=u.dtype, eps=h.eps)
        return (max(u.shape) ** 0.5 * u).view_as(grad), {"momentum": m, "factor": factor}

    def _iterate(self, x: Tensor, p: Tensor, shift: Tensor) -> Tensor:
        """Return x of the orthogonal [x, (p + shift)^(1/2)], by Newton-Schulz on both."""
        p = p + shift * torch.eye(len(p), dtype=p.dtype, device=p.device)
        for polynomial in polynomials("jordan", self.ns_steps):
            w = quintic(x @ x.mT + p, polynomial)
            x, p = w @ x, w @ p @ w
        return x


NOT_HIDDEN = frozenset(Role) - HIDDEN

RECIPES = (
    Recipe(
        "muon",
        Muon(),
        family="orthogonal",
        year=2024,
        paper="Jordan et al., https://kellerjordan.github.io/posts/muon",
        state="4 * m * n",
        parts=(
            adam_for_the_rest(
                HIDDEN, AdamW(lr=3e-4, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-10)
            ),
        ),
        differs=(
            "The 'polar express' tables of pytorch-optimizer, modded-nanogpt and nanochat are "
            "computed anew, with other numbers than the paper's.",
        ),
    ),
    Recipe(
        "d_muon",
        DMuon(),
        family="orthogonal",
        year=2025,
        paper="Liu et al., arXiv:2502.16982",
        state="4 * m * n",
        parts=(
            Part(
                "adam",
                NOT_HIDDEN,
                AdamW(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95)),
                follows=True,
            ),
        ),
        differs=(
            "torch.optim.Muon and pytorch-optimizer keep an average instead of a sum, which "
            "matters beside eps only.",
        ),
    ),
    Recipe(
        "normuon",
        NorMuon(),
        family="orthogonal",
        year=2025,
        paper="Li et al., arXiv:2510.05491",
        state="4 * m * n + 4 * m",
        parts=(adam_for_the_rest(HIDDEN, AdamW(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))),),
        differs=(
            "The authors' code is scale='norm' with nesterov and lr 0.02.",
            "microsoft/dion has Polar Express and other factors of shape.",
            "modded-nanogpt and nanochat take the mean along the longer side.",
        ),
    ),
    Recipe(
        "ortho_adam",
        OrthoAdam(),
        family="orthogonal",
        year=2025,
        paper="No paper; https://github.com/OpenRaiser/scaling-for-scaling",
        state="8 * m * n",
        differs=("The Scaling for Scaling benchmark runs it under the name Shampoo.",),
    ),
    Recipe(
        "mudam",
        Mudam(),
        family="orthogonal",
        year=2025,
        paper="Wen et al., arXiv:2509.02046",
        state="4 * m * n + 4 * n * n",
        parts=(
            adam_for_the_rest(
                HIDDEN, AdamW(lr=8e-3, weight_decay=0.2, betas=(0.95, 0.98), eps=1e-15)
            ),
        ),
        differs=(
            "The sweep's code multiplies the factor's average by the bias correction that its own "
            "comment divides by, which makes steps 20 times shorter.",
            "The sweep's Adam part looks ahead along its momentum, as NAdam.",
        ),
    ),
)
