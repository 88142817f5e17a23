"""Orthogonal, spectral and normalised methods, from their papers."""

from __future__ import annotations

import numpy as np

from references.base import Array, Reference


class Muon(Reference):
    """Jordan's Muon (github.com/KellerJordan/Muon), Newton-Schulz in float64.

    The blog post has B <- mu B + G, the repository B <- mu B + (1 - mu) G. Orthogonalisation
    forgets the factor, up to eps; this is the repository's. It scales convolution kernels by
    the last two dimensions, we (as the blog: "flatten the last three") by the flattened matrix.
    """

    def setup(self, momentum: float = 0.95, nesterov: bool = True, ns_steps: int = 5) -> None:
        self.mu, self.nesterov, self.ns_steps = momentum, nesterov, ns_steps
        self.buffer = np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        self.buffer = self.mu * self.buffer + (1 - self.mu) * g
        update = (1 - self.mu) * g + self.mu * self.buffer if self.nesterov else self.buffer
        matrix = update.reshape(len(update), -1)
        rows, columns = matrix.shape
        o = self.zeropower(matrix)
        return (np.sqrt(max(1.0, rows / columns)) * o).reshape(g.shape)

    def zeropower(self, matrix: Array) -> Array:
        a, b, c = 3.4445, -4.7750, 2.0315
        x = matrix / (np.linalg.norm(matrix) + 1e-7)
        for _ in range(self.ns_steps):
            # x (a + b x^T x + c (x^T x)^2) is the same polynomial from either side.
            gram = x @ x.T if x.shape[0] <= x.shape[1] else None
            if gram is not None:
                x = a * x + b * (gram @ x) + c * (gram @ gram @ x)
            else:
                gram = x.T @ x
                x = a * x + b * (x @ gram) + c * (x @ gram @ gram)
        return x


REFERENCES = {"muon": Muon}
