"""Matrix functions that several rules share."""

from __future__ import annotations

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]
"""a, b, c of a x + b (x x^T) x + c (x x^T)^2 x."""

JORDAN: Polynomial = (3.4445, -4.7750, 2.0315)
"""Jordan's quintic: fastest growth of small singular values, not convergence to 1
(https://kellerjordan.github.io/posts/muon)."""

POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""The best quintic for each step in turn (Amsel et al., 2025, arXiv:2505.16932, Algorithm 1)."""

SAFETY = 1.01
"""What Polar Express divides the matrix by beyond its norm, and the argument of every polynomial
but the last, against rounding."""

QUINTICS: dict[str, tuple[Polynomial, ...]] = {
    "jordan": (JORDAN,),
    "polar_express": (
        *((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]),
        POLAR_EXPRESS[-1],
    ),
}
"""The polynomials of Newton-Schulz, step by step; the last one repeats."""


def newton_schulz(
    matrix: Tensor,
    steps: int = 5,
    coefficients: str = "jordan",
    dtype: torch.dtype = torch.bfloat16,
    eps: Tensor | float = 1e-7,
) -> Tensor:
    """Return about U V^T of the singular value decomposition `matrix` = U S V^T.

    x <- (a I + b A + c A^2) x with A = x x^T, from x = matrix / ||matrix||_F.

    `matrix` is `[m, n]` (batched by `torch.vmap`); products are made in `dtype`, the result has
    the dtype of `matrix`. `coefficients` names one of `QUINTICS`. With Jordan's and 5 steps
    singular values end in about [0.7, 1.2]. Source: Jordan et al., 2024, "Muon"; Björck & Bowie,
    1971, for the iteration.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    safety = SAFETY if coefficients == "polar_express" else 1.0
    x = (x / (safety * x.norm() + eps)).to(dtype)
    for polynomial in polynomials(coefficients, steps):
        x = quintic(x @ x.mT, polynomial) @ x
    orthogonal: Tensor = (x.mT if tall else x).to(matrix.dtype)
    return orthogonal


def polynomials(coefficients: str, steps: int) -> list[Polynomial]:
    """Return the polynomials of so many steps."""
    table = QUINTICS[coefficients]
    return [table[min(step, len(table) - 1)] for step in range(steps)]


def quintic(gram: Tensor, polynomial: Polynomial) -> Tensor:
    """Return a I + b A + c A^2 of a square matrix A."""
    a, b, c = polynomial
    factor: Tensor = b * gram + c * (gram @ gram)
    # The a x term of an iteration joins the small square factor: one pass over x less per step.
    factor.diagonal().add_(a)
    return factor


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors of a symmetric matrix, in float64.

    In float64, and finite, it always converges. What is not finite counts as zero here, so that a
    run that diverges shows it in its loss instead of crashing: it is in the matrix still.
    """
    finite = torch.nan_to_num(matrix.double(), posinf=0.0, neginf=0.0)
    values, vectors = torch.linalg.eigh(finite)
    return values, vectors
