"""Methods that treat two parts of a matrix differently."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.optim import linalg
from steepest.optim.live import Hyper
from steepest.optim.recipe import HIDDEN, Recipe
from steepest.optim.rule import Rule, State, ema
from steepest.optim.rules.adam import adam_for_the_rest


@dataclass(frozen=True)
class Cosmos(Rule):
    """COSMOS (Liu et al., 2025, arXiv:2502.17410, Algorithm 1; eps and scales as in their code).

    M <- b1 M + (1 - b1) G, of m x n;  U: the `rank` leading eigenvectors of G^T G, at first S = 0
    U' = QR(b2 U S + (1 - b2) G^T G U);  S <- U'^T (b2 U S U^T + (1 - b2) G^T G) U';  U <- U'
    V <- b2 V + (1 - b2) (G U)^2
    A = M U / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps) U^T
    B = NewtonSchulz(M - M U U^T);  C = A + gamma sqrt(m n) B / |B|;  u = sqrt(m n) C / |C|

    SOAP in the leading subspace, Muon outside of it; a step's root mean square is lr. A rest M -
    M U U^T that rounding alone makes, as at the first step of a `rank` of the shorter side, counts
    as none. For hidden matrices; a tensor of more dimensions is a matrix of its first against the
    rest.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    rank: int = 64
    gamma: float = 0.1
    ns_steps: int = 5
    ns_dtype: str = "bfloat16"

    reads_param: ClassVar[bool] = False
    least_ndim: ClassVar[int] = 2
    splits: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return the average, and basis, block and second moment of the subspace, all zero."""
        m, n = len(param), param[0].numel()
        rank = min(self.rank, m, n)
        return {
            "exp_avg": torch.zeros_like(param),
            "basis": param.new_zeros(n, rank),
            "block": param.new_zeros(rank, rank),
            "exp_avg_sq": param.new_zeros(m, rank),
        }

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the factors that undo the bias of both moments."""
        b1, b2 = values["betas"]
        return {"scale1": 1 / (1 - b1**step), "root_scale2": (1 - b2**step) ** -0.5}

    def prepares(self, step: int) -> bool:
        """At the first step."""
        return step == 1

    def prepare(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the leading eigenvectors of G^T G, found on the shorter side."""
        g = grad.flatten(1).double()
        wide = g.shape[0] < g.shape[1]
        _, vectors = linalg.eigh(g @ g.mT if wide else g.mT @ g)
        leading = vectors.flip(-1)[:, : state["basis"].shape[1]]
        if wide:
            leading = torch.nn.functional.normalize(g.mT @ leading, dim=0, eps=1e-300)
        return {"basis": leading.to(grad.dtype)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return Adam's direction in the subspace plus the orthogonalised rest, normalised."""
        (b1, b2), g = h.betas, grad.flatten(1)
        old, s = state["basis"], state["block"]
        m = ema(state["exp_avg"], grad, b1)
        u = torch.linalg.qr(ema(old @ s, g.mT @ (g @ old), b2)).Q
        inside, overlap = g @ u, u.mT @ old
        s = ema(overlap @ s @ overlap.mT, inside.mT @ inside, b2)
        v = ema(state["exp_avg_sq"], inside * inside, b2)
        moment = m.flatten(1)
        led = moment @ u
        a = (h.scale1 * led / (h.root_scale2 * v.sqrt() + h.eps)) @ u.mT
        b = newton_schulz_of_rest(moment, moment - led @ u.mT, self)
        size = math.sqrt(g.numel())
        c = a + h.gamma * size * b / (b.norm() + h.eps)
        direction = size * c / (c.norm() + h.eps)
        new = {"exp_avg": m, "basis": u, "block": s, "exp_avg_sq": v}
        return direction.view_as(grad), new


def newton_schulz_of_rest(whole: Tensor, rest: Tensor, rule: Cosmos) -> Tensor:
    """Return the orthogonalised rest of a matrix, zero where rounding made it."""
    rounding = 10 * math.sqrt(whole.shape[1]) * torch.finfo(whole.dtype).eps
    rest = torch.where(rest.norm() <= rounding * whole.norm(), 0.0, rest)
    return linalg.newton_schulz(rest, rule.ns_steps, dtype=getattr(torch, rule.ns_dtype))


RECIPES = (
    Recipe(
        "cosmos",
        Cosmos(),
        family="hybrid",
        year=2025,
        paper="Liu et al., arXiv:2502.17410",
        state="4 * m * n + 4 * min(rank, m, n) * (m + n + min(rank, m, n))",
        parts=(adam_for_the_rest(HIDDEN),),
        differs=(
            "The paper's Algorithm 1 has eps inside the root, and sqrt(n) for sqrt(m n) in u.",
            "COSMOS_optim.py of the authors has Nesterov's heavy ball in place of M, gamma 0.2, "
            "and weight decay, which their other files ignore.",
            "The authors' file for GPT has U on the rows, as its weights are [in, out].",
            "The authors' COSMOS.py never stores S and the new U, and multiplies by its ratio "
            "twice; COSMOS_optim.py stores them.",
        ),
    ),
)
