"""Gradients normalised by their own rows, columns or singular values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.optim.hyperparameters import is_zero
from steepest.optim.live import Hyper
from steepest.optim.recipe import HIDDEN, MATRICES, Part, Recipe
from steepest.optim.roles import Role
from steepest.optim.rule import Rule, State, ema, one_of
from steepest.optim.rules.adam import AdamW, adam_for_the_rest


def unit(matrix: Tensor, eps: Tensor, dim: int = 1) -> Tensor:
    """Return rows (dim 1) or columns (dim 0) over their Euclidean norms, at least `eps`."""
    return matrix / torch.maximum(matrix.norm(dim=dim, keepdim=True), eps)


@dataclass(frozen=True)
class MatrixRule(Rule):
    """What the rules of this file share: a direction from momentum or gradient alone."""

    reads_param: ClassVar[bool] = False
    least_ndim: ClassVar[int] = 2
    splits: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return nothing."""
        return {}


@dataclass(frozen=True)
class RMNP(MatrixRule):
    """RMNP, Muon with normalised rows in place of Newton-Schulz (Deng et al., 2026,
    arXiv:2603.20527).

    m <- mu m + g;  x = g + mu m with nesterov, else m
    u = max(1, rows / columns)^(1/2) (rows of x / max(their norm, eps))

    Nesterov and the factor (`shape_scale`) are the authors' code's; the paper's algorithm has
    neither. For hidden matrices; a tensor of more dimensions is a matrix of its
    first against the rest.
    """

    lr: float = 4e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    shape_scale: bool = True
    eps: float = 1e-12

    def init(self, param: Tensor) -> State:
        """Return the momentum, zero."""
        return {"momentum": torch.zeros_like(param)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the momentum with rows of norm one."""
        m = h.momentum * state["momentum"] + grad
        x = (grad + h.momentum * m if self.nesterov else m).flatten(1)
        scale = max(1.0, x.shape[0] / x.shape[1]) ** 0.5 if self.shape_scale else 1.0
        return (scale * unit(x, h.eps)).view_as(grad), {"momentum": m}


@dataclass(frozen=True)
class SWAN(MatrixRule):
    """SWAN, normalised and whitened gradients without state (Ma et al., 2024, arXiv:2412.13148).

    N = rows of g less their mean (if `center`) / (their root mean square + eps)
    X = N / (||N||_F + eps);  `ns_steps` times: X <- beta (3 X - X X^T X)
    u = scale (rows columns)^(1/2) X / (||X||_F + eps)

    For hidden matrices, with Adam at the same lr for the rest: `adam_lr` follows `lr` unless given.
    X ends as (N N^T)^(-1/2) N, nearly: beta 1/2 converges to it, the paper's 0.8 keeps singular
    values in [0.5, 1.6]. The paper iterates (N N^T)^(-1/2) itself, which is the same but for its
    rounding errors, hundreds of times these. A tensor of more dimensions is a matrix of its first
    against the rest.
    """

    lr: float = 0.02
    weight_decay: float = 0.0
    ns_steps: int = 10
    beta: float = 0.8
    scale: float = 0.05
    center: bool = True
    eps: float = 1e-8

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the whitened gradient with elements of the size of `scale`."""
        g = grad.flatten(1)
        rows, columns = g.shape
        n = g - g.mean(1, keepdim=True) if self.center else g
        n = n / (n.norm(dim=1, keepdim=True) / columns**0.5 + h.eps)
        x = n / (n.norm() + h.eps)
        for _ in range(self.ns_steps):  # The smaller square of the two that are the same.
            cubed = (x @ x.mT) @ x if rows <= columns else x @ (x.mT @ x)
            x = h.beta * (3 * x - cubed)
        u = h.scale * (rows * columns) ** 0.5 * (x / (x.norm() + h.eps))
        return u.view_as(grad), {}


@dataclass(frozen=True)
class SinkGD(MatrixRule):
    """SinkGD, rows and columns normalised in turn, without state (Scetbon et al., 2025,
    arXiv:2502.06742, Algorithms 3 and 4).

    x = g;  `iterations` times:
      rows of x <- columns^(1/2) row / max(its norm, eps)
      columns of x <- rows^(1/2) column / max(its norm, eps)
    u = scale x

    For hidden matrices, with Adam at the same lr for the rest: `adam_lr` follows `lr` unless given.
    A tensor of more dimensions is a matrix of its first against the rest.
    """

    lr: float = 0.02
    weight_decay: float = 0.0
    iterations: int = 5
    scale: float = 0.05
    eps: float = 1e-8

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the gradient with rows and columns of one size."""
        x = grad.flatten(1)
        rows, columns = x.shape
        for _ in range(self.iterations):
            x = columns**0.5 * unit(x, h.eps, dim=1)
            x = rows**0.5 * unit(x, h.eps, dim=0)
        return (h.scale * x).view_as(grad), {}


@dataclass(frozen=True)
class Scale(MatrixRule):
    """SCALE, SGD with normalised rows or columns (Glentis et al., 2025, arXiv:2506.16659, Alg. 1).

    m <- mu m + (1 - mu) g (m = g without momentum);  u = rows (columns) of m / max(their norm, eps)

    Hidden matrices and the head have rows of norm one, the embedding columns ([vocab, hidden]), and
    only the head has momentum; vectors get Adam. The authors' code makes the root mean square one
    instead: its lr is ours over the root of a row's length (of the vocabulary for the embedding). A
    tensor of more dimensions is a matrix of its first against the rest.
    """

    lr: float = 0.02
    weight_decay: float = 0.0
    momentum: float = 0.0
    norm: str = one_of("row", "column")
    eps: float = 1e-8

    def init(self, param: Tensor) -> State:
        """Return the gradient's moving average, or nothing when momentum is 0."""
        return {} if is_zero(self.momentum) else {"momentum": torch.zeros_like(param)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the gradient or its average with rows (columns) of norm one."""
        new = {k: ema(m, grad, h.momentum) for k, m in state.items()}
        x = new.get("momentum", grad).flatten(1)
        return unit(x, h.eps, dim=1 if self.norm == "row" else 0).view_as(grad), new


NOT_HIDDEN = frozenset(Role) - HIDDEN

RECIPES = (
    Recipe(
        "rmnp",
        RMNP(),
        family="normalised",
        year=2026,
        paper="Deng et al., arXiv:2603.20527",
        state="4 * m * n",
        parts=(adam_for_the_rest(HIDDEN, AdamW(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))),),
        differs=(
            "microsoft/dion follows the paper's algorithm, and adds 1e-8 to norms.",
            "Scaling for Scaling runs it on embedding and head too.",
        ),
    ),
    Recipe(
        "swan",
        SWAN(),
        family="normalised",
        year=2024,
        paper="Ma et al., arXiv:2412.13148",
        state="0",
        parts=(Part("adam", NOT_HIDDEN, AdamW(lr=0.02, weight_decay=0.0), follows=True),),
        differs=(
            "The paper's third version has a cheaper variant with diagonals in the iteration, "
            "beta 0.4 and 2 steps.",
        ),
    ),
    Recipe(
        "sinkgd",
        SinkGD(),
        family="normalised",
        year=2025,
        paper="Scetbon et al., arXiv:2502.06742",
        state="0",
        parts=(Part("adam", NOT_HIDDEN, AdamW(lr=0.02, weight_decay=0.0), follows=True),),
        differs=(
            "adv-optm's SinkSGD begins with the columns of tall matrices, floors norms higher, "
            "steps vectors by their sign, and has no factor 0.05.",
        ),
    ),
    Recipe(
        "scale",
        Scale(),
        family="normalised",
        year=2025,
        paper="Glentis et al., arXiv:2506.16659",
        state="4 * m * n if momentum else 0",
        parts=(
            Part("embedding", frozenset({Role.EMBEDDING}), Scale(norm="column"), follows=True),
            Part("head", frozenset({Role.HEAD}), Scale(momentum=0.9), follows=True),
            adam_for_the_rest(MATRICES, AdamW(weight_decay=0.0)),
        ),
        differs=(
            "The authors' code gives rows and columns a root mean square of one instead of a norm "
            "of one.",
        ),
    ),
)
