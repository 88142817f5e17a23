"""Matrix functions that several rules share."""

from __future__ import annotations

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan's quintic: fastest growth of small singular values, not convergence to 1
(https://kellerjordan.github.io/posts/muon)."""


def newton_schulz(
    matrix: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-7,
) -> Tensor:
    """Return about U V^T of the singular value decomposition `matrix` = U S V^T.

    x <- (a I + b A + c A^2) x with A = x x^T, from x = matrix / ||matrix||_F.

    `matrix` is `[m, n]` (batched by `torch.vmap`); products are made in `dtype`, the result has
    the dtype of `matrix`. With Jordan's coefficients and 5 steps singular values end in about
    [0.7, 1.2]. Source: Jordan et al., 2024, "Muon"; Björck & Bowie, 1971, for the iteration.
    """
    a, b, c = coefficients
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = (x / (x.norm() + eps)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        factor = b * gram + c * (gram @ gram)
        # The a x term joins the small square factor: one pass over x less at every step.
        factor.diagonal().add_(a)
        x = factor @ x
    orthogonal: Tensor = (x.mT if tall else x).to(matrix.dtype)
    return orthogonal
