"""Kronecker-factored preconditioners, from their papers."""

from __future__ import annotations

import numpy as np

from references.base import Array, Reference


class SOAP(Reference):
    """Vyas et al., Algorithm 3, with what the authors' code adds (github.com/nikhilvyas/SOAP).

    The first gradient initialises the factors and bases and moves nothing; bias corrections count
    from the first move; a refresh (QR of factor @ basis, Algorithm 4) sorts the basis by its
    Rayleigh quotients, V with it. Sides longer than `max_precond_dim` and vectors have no basis.

    After one gradient G [m, n] with m < n the right factor G^T G has n - m zero eigenvalues, whose
    eigenvectors are anyone's choice, and the trajectory depends on them. So `adopt` takes the
    first bases of the implementation under test, after checking that they are eigenbases of
    the factors, in descending order. From there on everything is determined (up to signs, which
    cancel). Convolutions: the authors' code has a factor per dimension, we flatten to a matrix.
    """

    def setup(
        self,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        update_interval: int = 10,
        max_precond_dim: int = 10_000,
    ) -> None:
        self.betas, self.eps, self.interval = betas, eps, update_interval
        self.shampoo_beta = betas[1] if shampoo_beta is None else shampoo_beta
        self.shape = self.x.shape
        self.rows, self.columns = (
            (self.shape[0], self.x[0].size) if self.x.ndim > 1 else (1, self.x.size)
        )
        self.left = self.x.ndim > 1 and self.rows <= max_precond_dim
        self.right = self.x.ndim > 1 and self.columns <= max_precond_dim
        self.m = np.zeros((self.rows, self.columns))
        self.v = np.zeros((self.rows, self.columns))
        self.l_factor, self.r_factor = np.zeros((self.rows,) * 2), np.zeros((self.columns,) * 2)
        self.ql = np.eye(self.rows)
        self.qr = np.eye(self.columns)

    def accumulate(self, g: Array) -> None:
        beta = self.shampoo_beta
        if self.left:
            self.l_factor = beta * self.l_factor + (1 - beta) * g @ g.T
        if self.right:
            self.r_factor = beta * self.r_factor + (1 - beta) * g.T @ g

    def direction(self, g: Array) -> Array | None:
        g = g.reshape(self.rows, self.columns)
        if self.t == 1:
            self.accumulate(g)
            if self.left:
                self.ql = np.linalg.eigh(self.l_factor)[1][:, ::-1]
            if self.right:
                self.qr = np.linalg.eigh(self.r_factor)[1][:, ::-1]
            return None
        moves = self.t - 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * (self.ql.T @ g @ self.qr) ** 2
        m_hat = (self.ql.T @ self.m @ self.qr) / (1 - b1**moves)
        n = m_hat / (np.sqrt(self.v / (1 - b2**moves)) + self.eps)
        u = self.ql @ n @ self.qr.T
        self.accumulate(g)
        if moves % self.interval == 0:
            self.refresh()
        return u.reshape(self.shape)

    def refresh(self) -> None:
        if self.left:
            self.ql, order = one_power_step(self.l_factor, self.ql)
            self.v = self.v[order]
        if self.right:
            self.qr, order = one_power_step(self.r_factor, self.qr)
            self.v = self.v[:, order]

    def adopt(self, left: Array | None, right: Array | None, tolerance: float = 1e-9) -> None:
        """Take the implementation's first bases, if they are eigenbases of our factors."""
        assert (left is not None, right is not None) == (self.left, self.right)
        if left is not None:
            assert_eigenbasis(self.l_factor, left, tolerance)
            self.ql = left
        if right is not None:
            assert_eigenbasis(self.r_factor, right, tolerance)
            self.qr = right


def one_power_step(factor: Array, basis: Array) -> tuple[Array, Array]:
    """Return the basis after a power iteration and QR, largest Rayleigh quotient first."""
    rayleigh = np.einsum("ik,ij,jk->k", basis, factor, basis)
    order = np.argsort(-rayleigh, kind="stable")
    return np.linalg.qr(factor @ basis[:, order])[0], order


def assert_eigenbasis(factor: Array, basis: Array, tolerance: float = 1e-9) -> None:
    """Check that basis^T factor basis is diagonal and descending, and the basis orthogonal."""
    scale = max(float(np.linalg.norm(factor)), 1e-300)
    np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=tolerance)
    diagonal = basis.T @ factor @ basis
    values = np.diag(diagonal)
    assert np.abs(diagonal - np.diag(values)).max() <= tolerance * scale
    assert np.all(np.diff(values) <= tolerance * scale)


REFERENCES = {"soap": SOAP}
