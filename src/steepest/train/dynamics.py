"""How a step moved a tensor of weights, given the tensor before and after it.

W are the weights before the step and W' after it, D = W' - W the update with weight decay and all,
G the gradient that the optimizer was given (after clipping), M the optimizer's momentum before the
step. All is computed in float64. Singular values are those of matrices: a tensor [..., out, in] is
a stack of them, as a bank of experts is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

MOMENTA = ("momentum", "exp_avg", "momentum_buffer")
"""Names of momentum in optimizers' states: steepest's and torch's own."""
SUBSPACES = ("projection", "norm")
"""Names in states of momentum in a subspace: GaLore's, and APOLLO's, whose projection is drawn."""


@dataclass(frozen=True)
class Dynamics:
    """The numbers of one tensor at one step; None where one is not defined."""

    weight_norm: float
    """||W||_F."""
    gradient_norm: float | None
    """||G||_F."""
    update_norm: float
    """||D||_F."""
    relative_update: float | None
    """||D||_F / ||W||_F."""
    angular_update: float | None
    """Angle between W and W' in radians."""
    gradient_momentum_alignment: float | None
    """Cosine <G, M> / (||G||_F ||M||_F) of the gradient and the momentum that it will enter."""
    sign_agreement: float | None
    """Share of elements with D G < 0, which go downhill, of those with D G != 0."""
    spectral_norm: float | None
    """Largest singular value of W; of a stack, the largest of all."""
    stable_rank: float | None
    """||W||_F^2 / ||W||_2^2; of a stack, the mean over its matrices."""
    update_effective_rank: float | None
    """exp(-sum_i p_i log p_i), p_i = s_i / sum_j s_j, over the singular values s of D (Roy and
    Vetterli, 2007, "The effective rank"); of a stack, the mean over its matrices."""

    def as_record(self) -> dict[str, float]:
        """Return the numbers that there are and that JSON can hold."""
        return {k: v for k, v in asdict(self).items() if v is not None and math.isfinite(v)}


@torch.no_grad()
def measure(
    before: Tensor,
    after: Tensor,
    gradient: Tensor | None,
    momentum: Tensor | None,
    *,
    matrices: bool,
) -> Dynamics:
    """Return the dynamics of one tensor; `matrices` says whether it has singular values.

    Takes two eigenvalue decompositions per matrix, of the size of its smaller side, and waits for a
    GPU. Tensors all have one shape.
    """
    w, new = before.double(), after.double()
    d = new - w
    g = None if gradient is None else gradient.double()
    m = None if momentum is None else momentum.double()
    norm, update = _norm(w), _norm(d)
    numbers = dict.fromkeys(("spectral_norm", "stable_rank", "update_effective_rank"))
    return Dynamics(
        weight_norm=norm,
        gradient_norm=None if g is None else _norm(g),
        update_norm=update,
        relative_update=update / norm if norm else None,
        angular_update=_angle(w, new),
        gradient_momentum_alignment=None if g is None or m is None else _cosine(g, m),
        sign_agreement=None if g is None else _downhill(d, g),
        **(_spectra(w, d) if matrices else numbers),
    )


def momentum_of(state: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """Return the momentum in a parameter's optimizer state, None if it has none to compare.

    One kept in a subspace, as GaLore's and APOLLO's are, can't be compared to the gradient, and
    neither can the codes of one kept in 8 bits.
    """
    if any(name in state for name in SUBSPACES):
        return None
    found = (state.get(name) for name in MOMENTA)
    return next(
        (m for m in found if isinstance(m, Tensor) and m.shape == shape and m.is_floating_point()),
        None,
    )


def singular_values(matrices: Tensor) -> Tensor:
    """Return float64 [..., min(out, in)], smallest first, by the smaller Gram matrix.

    They are right to about 1e-8 of the largest, and several times faster than torch's own.
    """
    x = matrices.double()
    x = x.mT if x.shape[-2] > x.shape[-1] else x
    largest = x.abs().amax((-2, -1), keepdim=True)
    scale = torch.where(largest > 0, largest, 1)  # squares of small numbers would vanish
    gram = x / scale @ (x / scale).mT
    values: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return values * scale.squeeze(-1)


def effective_rank(values: Tensor) -> Tensor:
    """Return exp of the entropy of singular values over the last dimension; NaN if all are 0."""
    shares = values / values.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy.exp()


def _spectra(w: Tensor, d: Tensor) -> dict[str, float | None]:
    if not (torch.isfinite(w).all() and torch.isfinite(d).all()):
        return dict.fromkeys(("spectral_norm", "stable_rank", "update_effective_rank"))
    of_weights, of_update = singular_values(w), singular_values(d)
    largest = of_weights[..., -1]
    stable = w.square().sum((-2, -1)) / largest.square()
    return {
        "spectral_norm": largest.max().item(),
        "stable_rank": stable.mean().item(),
        "update_effective_rank": effective_rank(of_update).mean().item(),
    }


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x).item())


def _angle(a: Tensor, b: Tensor) -> float | None:
    """Return the angle by the lengths of sum and difference: acos is blind below 1e-8."""
    lengths = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)
    if not all(length > 0 for length in lengths):
        return None
    a, b = a / lengths[0], b / lengths[1]
    return 2 * math.atan2(_norm(a - b), _norm(a + b))


def _cosine(a: Tensor, b: Tensor) -> float | None:
    product = _norm(a) * _norm(b)
    return (a * b).sum().item() / product if product else None


def _downhill(d: Tensor, g: Tensor) -> float | None:
    signs = d.sign() * g.sign()
    moved = int((signs != 0).sum())
    return int((signs < 0).sum()) / moved if moved else None
