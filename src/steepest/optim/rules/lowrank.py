"""Adam and Adafactor in few directions of the gradient, or in its singular basis.

A matrix `[m, n]` is projected on its shorter side: a tall or square one from the right, G P^T with
P `[rank, n]`, a wide one from the left, P^T G with P `[m, rank]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.optim import linalg
from steepest.optim.live import Hyper
from steepest.optim.quantisation import MIN_QUANTISED
from steepest.optim.recipe import HIDDEN, Recipe
from steepest.optim.roles import NamedRole
from steepest.optim.rule import Rule, State, ema
from steepest.optim.rules.adam import TwoMoments, adam_for_the_rest
from steepest.optim.rules.eight_bit import Quantised
from steepest.optim.rules.factored import Adafactor
from steepest.optim.wrapper import Wrapper

FAMILY = "low rank"


def is_tall(tensor: Tensor) -> bool:
    """Say whether a tensor, as a matrix of its first dimension against the rest, is not wide."""
    return tensor.shape[0] >= math.prod(tensor.shape[1:])


def shapes(tensor: Tensor, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of a projection and of what it makes of a tensor."""
    m, n = tensor.shape[0], math.prod(tensor.shape[1:])
    return ((rank, n), (m, rank)) if is_tall(tensor) else ((m, rank), (rank, n))


def down(tensor: Tensor, projection: Tensor) -> Tensor:
    """Return a tensor as a matrix of few columns, or of few rows if it is wide."""
    matrix = tensor.flatten(1)
    return matrix @ projection.mT if is_tall(tensor) else projection.mT @ matrix


def up(low: Tensor, projection: Tensor, like: Tensor) -> Tensor:
    """Return what `down` made of a tensor like `like` in that tensor's shape."""
    matrix: Tensor = low @ projection if is_tall(like) else projection @ low
    return matrix.view_as(like)


def channels(adapted: Tensor, low: Tensor, like: Tensor) -> Tensor:
    """Return how much longer Adam made each channel: a row of what was tall, else a column.

    The ratios have the dimensions of `like`, so that they multiply it.
    """
    dim = 1 if is_tall(like) else 0
    ratio: Tensor = adapted.norm(dim=dim) / (low.norm(dim=dim) + 1e-8)
    return ratio.view(-1, *[1] * (like.ndim - 1)) if dim else ratio.view(1, *like.shape[1:])


def limited(update: Tensor, last_norm: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Return an update whose norm has grown by a factor of `limit` at most, and its norm."""
    norm = update.norm()
    excess = torch.clamp(norm / (last_norm + 1e-8) / limit, min=1.0)
    return update / excess, norm / excess


def singular_basis(tensor: Tensor, rank: int) -> Tensor:
    """Return the leading singular vectors of a tensor's shorter side, as a projection.

    The entry of largest size of each is positive. What is not finite counts as zero: such a
    gradient reaches the parameter by `down`.
    """
    # Eigenvectors of the small Gram matrix take half the time of a float64 SVD, and with squares in
    # float64 they are no less exact than a float32 SVD's.
    matrix, tall = tensor.flatten(1).double(), is_tall(tensor)
    _, vectors = linalg.eigh(matrix.mT @ matrix if tall else matrix @ matrix.mT)
    vectors = vectors.flip(-1)[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    return (vectors.mT if tall else vectors).to(tensor.dtype)


@dataclass(frozen=True)
class EarlyAdamW(TwoMoments):
    """AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101, Algorithm 2).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    """

    reads_param: ClassVar[bool] = False

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the corrected first moment over the root of the corrected second."""
        m, v = self.moments(grad, state, h)
        direction = h.scale1 * m / (h.root_scale2 * v.sqrt() + h.eps)
        return direction, {"exp_avg": m, "exp_avg_sq": v}


@dataclass(frozen=True)
class LateAdamW(EarlyAdamW):
    """AdamW that adds eps before it corrects the bias, as authors of low-rank methods do.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    u = sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)
    """

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return both corrections in the factor of the first moment."""
        found = super().scalars(step, values)
        return {"scale1": found["scale1"] / found["root_scale2"], "root_scale2": 1.0}


@dataclass(frozen=True)
class GaLore(Wrapper):
    """GaLore, a method in a low-rank projection (Zhao et al., 2024, arXiv:2403.03507, Algorithm 2).

    every `update_interval` steps P <- the `rank` leading singular vectors of G
    R = G P^T (P^T G if G has more columns than rows);  u = scale back(method's direction for R)

    back() is multiplication by P. The method's state is that of the small R and is kept when P
    changes; each singular vector's entry of largest size is positive. For hidden matrices; a tensor
    of more dimensions is a matrix of its first against the rest. A `rank` above the shorter side
    is that side: the method in a rotated basis, without saving.
    """

    rank: int = 128
    update_interval: int = 200
    scale: float = 0.25

    least_ndim: ClassVar[int] = 2

    def init(self, param: Tensor) -> State:
        """Return the method's state of the projected matrix, and the projection, zero."""
        projection, low = shapes(param, self._rank(param))
        return self.inner.init(param.new_zeros(low)) | {"projection": param.new_zeros(projection)}

    def prepares(self, step: int) -> bool:
        """At the first step, and `update_interval` steps after each time."""
        return (step - 1) % self.update_interval == 0

    def prepare(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the projection on the leading singular vectors of this gradient."""
        return {"projection": singular_basis(grad, self._rank(grad))}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the method's direction for the projected gradient, projected back."""
        low = down(grad, state["projection"])
        adapted, new = self.inner.update(low, low * torch.nan, state, h)
        return h.scale * up(adapted, state["projection"], grad), new

    def _rank(self, tensor: Tensor) -> int:
        return min(self.rank, tensor.shape[0], math.prod(tensor.shape[1:]))


@dataclass(frozen=True)
class Fira(GaLore):
    """Fira, GaLore and the rest of the gradient (Chen et al., 2024, arXiv:2410.01623, Algorithm 1).

    R = G P^T;  N = AdamW's direction for R;  S = G - R P
    S <- S |N_j| / |R_j| in row j (column j if G has more columns than rows)
    S <- S / max(1, |S| / |S of the last step| / growth_limit);  u = scale (N P + S)

    The first step is not limited. After a step without gradient the rest grows again from 1e-8.
    """

    growth_limit: float = 1.01

    def init(self, param: Tensor) -> State:
        """Return GaLore's state, and a norm of the last rest that limits nothing."""
        return super().init(param) | {"rest_norm": param.new_full((), math.inf)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return Adam's direction projected back, plus the scaled and limited rest."""
        projection = state["projection"]
        low = down(grad, projection)
        adapted, new = self.inner.update(low, low * torch.nan, state, h)
        rest = (grad - up(low, projection, grad)) * channels(adapted, low, grad)
        rest, norm = limited(rest, state["rest_norm"], h.growth_limit)
        return h.scale * (up(adapted, projection, grad) + rest), {**new, "rest_norm": norm}


@dataclass(frozen=True)
class Conda(LateAdamW):
    """Conda, column-normalised Adam (Wang et al., 2025, arXiv:2509.24218; the authors' code).

    m <- b1 m + (1 - b1) G;  every `update_interval` steps Q <- singular vectors of m, shorter side
    v <- b2 v + (1 - b2) (G Q^T)^2  (Q^T G if G has more columns than rows)
    u = scale sqrt(1 - b2^t) / (1 - b1^t) (m Q^T / (sqrt(v) + eps)) Q

    Q is square: nothing is cut off, and there is no rank. v is kept when Q changes. For hidden
    matrices; a tensor of more dimensions is a matrix of its first against the rest.
    """

    lr: float = 1e-2
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    update_interval: int = 2000
    scale: float = 0.25

    elementwise: ClassVar[bool] = False
    least_ndim: ClassVar[int] = 2

    def init(self, param: Tensor) -> State:
        """Return both moments and the basis, zero."""
        side = min(param.shape[0], math.prod(param.shape[1:]))
        return super().init(param) | {"basis": param.new_zeros(side, side)}

    def prepares(self, step: int) -> bool:
        """At the first step, and `update_interval` steps after each time."""
        return (step - 1) % self.update_interval == 0

    def prepare(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the singular basis of the first moment that this gradient gives."""
        m = ema(state["exp_avg"], grad, h.betas[0])
        return {"basis": singular_basis(m, len(state["basis"]))}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the first moment over the root of the second, in the basis, rotated back."""
        b1, b2 = h.betas
        basis = state["basis"]
        m = ema(state["exp_avg"], grad, b1)
        low = down(grad, basis).view_as(grad)
        v = ema(state["exp_avg_sq"], low * low, b2)
        adapted = down(m, basis) / (v.flatten(1).sqrt() + h.eps)
        return h.scale * h.scale1 * up(adapted, basis, grad), {"exp_avg": m, "exp_avg_sq": v}


def low_rank(
    name: str,
    rule: Rule,
    year: int,
    paper: str,
    state: str,
    *differs: str,
    adapt: Callable[[NamedRole, Tensor], Mapping[str, Any]] | None = None,
) -> Recipe:
    """Return a recipe of this family: hidden matrices by `rule`, AdamW for the rest."""
    rest = (adam_for_the_rest(HIDDEN),)
    return Recipe(name, rule, FAMILY, year, paper, state, parts=rest, differs=differs, adapt=adapt)


def moments_8bit() -> str:
    """Return the bytes of 8-bit moments of the projected matrix."""
    size = "min(rank, m, n) * max(m, n)"
    codes = f"2 * ({size} + 4 * -(-{size} // block_size)) if {size} >= {MIN_QUANTISED}"
    return f"({codes} else 8 * {size})"


GALORE = "Zhao et al., arXiv:2403.03507"
KOZISTR = (
    "pytorch_optimizer counts steps from 1: it refreshes at steps 1, T, 2T, ... of interval T."
)
RECIPES = (
    low_rank(
        "galore_adamw",
        GaLore(inner=LateAdamW(lr=1e-2, weight_decay=0.0, eps=1e-6)),
        2024,
        GALORE,
        "4 * min(rank, m, n) * (2 * max(m, n) + min(m, n))",
        "galore_torch decays the weight after the step, here it is the weight before the step.",
        "The paper's Algorithm 2 corrects the moments' bias before adding eps, the authors' code "
        "after.",
        KOZISTR,
    ),
    low_rank(
        "galore_adafactor",
        GaLore(inner=Adafactor()),
        2024,
        GALORE,
        "4 * (max(m, n) + min(rank, m, n) * (1 + min(m, n)))"
        " + (0 if beta1 is None else 4 * max(m, n) * min(rank, m, n))",
        "galore_torch has the learning rate inside the first moment (off by default).",
    ),
    low_rank(
        "galore_adamw8bit",
        GaLore(inner=Quantised(inner=EarlyAdamW(lr=1e-2, weight_decay=0.0))),
        2024,
        f"{GALORE}; 8-bit states arXiv:2110.02861",
        f"4 * min(rank, m, n) * min(m, n) + {moments_8bit()}",
        "galore_torch passes arguments to bitsandbytes by position: with bitsandbytes 0.50 it "
        "limits the norm of the step, and matrices too small for 8 bits do not move.",
        "GaLore was published with blocks of 2048, bitsandbytes' default before 0.44.",
    ),
    low_rank(
        "fira",
        Fira(inner=LateAdamW(lr=1e-2, weight_decay=0.0)),
        2024,
        "Chen et al., arXiv:2410.01623",
        "4 * min(rank, m, n) * (2 * max(m, n) + min(m, n)) + 4",
        "The authors' package fira, and pytorch_optimizer, take scale times the low-rank part from "
        "the gradient, do not multiply the rest by scale, and correct the bias after the limiter.",
    ),
    low_rank(
        "conda",
        Conda(),
        2025,
        "Wang et al., arXiv:2509.24218",
        "8 * m * n + 4 * min(m, n) ** 2",
        KOZISTR,
        "Public benchmarks pass a rank to Conda, which ignores it.",
    ),
)
