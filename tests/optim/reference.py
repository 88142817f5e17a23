"""The papers' updates in float64 NumPy, one parameter at a time, written from the formulas.

Every class takes the initial parameter and the hyperparameters, and `step(grad, lr)` moves
`self.x`. Decay is decoupled in all: x <- x - lr (u + weight_decay x), with the x before the step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray


class Reference:
    """A parameter and the method that moves it."""

    def __init__(self, x: Array, *, weight_decay: float = 0.0, **hyper: Any) -> None:
        self.x = np.array(x, dtype=np.float64)
        self.weight_decay = weight_decay
        self.t = 0
        self.setup(**hyper)

    def setup(self, **hyper: Any) -> None:
        """Keep hyperparameters and make the state."""
        raise NotImplementedError

    def direction(self, g: Array) -> Array | None:
        """Return the direction of descent at this step, or None where nothing moves."""
        raise NotImplementedError

    def step(self, grad: Array, lr: float) -> None:
        """Move the parameter along its gradient."""
        self.t += 1
        u = self.direction(np.asarray(grad, dtype=np.float64))
        if u is not None:
            self.x = self.x - lr * u - lr * self.weight_decay * self.x


class SGD(Reference):
    """Polyak's heavy ball, and Nesterov's in the form of Sutskever et al. (ICML 2013).

    Loshchilov & Hutter's SGDW (Algorithm 1) has the learning rate inside the buffer, torch and we
    have it outside: the same at a constant rate only.
    """

    def setup(self, momentum: float = 0.9, nesterov: bool = False) -> None:
        self.mu, self.nesterov = momentum, nesterov
        self.buffer = np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        self.buffer = self.mu * self.buffer + g
        return g + self.mu * self.buffer if self.nesterov else self.buffer


class SignMethod(Reference):
    """Base of methods whose direction is a sign.

    `margin` is, per element, the smallest |value| whose sign was taken, relative to the sum of
    the absolute values it was added up from: where it is near the rounding error of a precision,
    that precision can't decide the sign. An exact zero stays zero in any precision.
    """

    def setup(self, **hyper: Any) -> None:
        self.m = np.zeros_like(self.x)
        self.size = np.zeros_like(self.x)
        self.margin = np.full_like(self.x, np.inf)

    def sign(self, value: Array, size: Array) -> Array:
        exact = size == 0
        relative = np.where(exact, np.inf, np.abs(value) / np.where(exact, 1.0, size))
        self.margin = np.minimum(self.margin, relative)
        return np.sign(value)


class Signum(SignMethod):
    """Bernstein et al., Algorithm 2: m <- b m + (1 - b) g;  x <- x - lr sign(m)."""

    def setup(self, momentum: float = 0.9) -> None:
        super().setup()
        self.beta = momentum

    def direction(self, g: Array) -> Array:
        self.m = self.beta * self.m + (1 - self.beta) * g
        self.size = self.beta * self.size + (1 - self.beta) * np.abs(g)
        return self.sign(self.m, self.size)


class Lion(SignMethod):
    """Chen et al., Algorithm 2: c = b1 m + (1 - b1) g;  x <- x - lr (sign(c) + wd x)."""

    def setup(self, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().setup()
        self.betas = betas

    def direction(self, g: Array) -> Array:
        b1, b2 = self.betas
        u = self.sign(b1 * self.m + (1 - b1) * g, b1 * self.size + (1 - b1) * np.abs(g))
        self.m = b2 * self.m + (1 - b2) * g
        self.size = b2 * self.size + (1 - b2) * np.abs(g)
        return u


class AdamW(Reference):
    """Loshchilov & Hutter, Algorithm 2, with decay lr * wd as in torch (the paper's schedule
    multiplier eta is our lr divided by its alpha)."""

    def setup(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.betas, self.eps = betas, eps
        self.m, self.v = np.zeros_like(self.x), np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        m_hat = self.m / (1 - b1**self.t)
        v_hat = self.v / (1 - b2**self.t)
        return m_hat / (np.sqrt(v_hat) + self.eps)


class Adafactor(Reference):
    """Shazeer & Stern, Algorithms 4 (matrices) and 5 (vectors) with rho_t = lr and no alpha_t.

    Sums as in the paper, where implementations keep means: R C / (1^T R) is the same. More than
    two dimensions: a matrix per leading index, as in the authors' mesh_tensorflow.
    The first moment is of the clipped update, before lr (torch-style; transformers and
    pytorch_optimizer have lr inside it: the same at a constant rate only).
    """

    def setup(
        self,
        beta1: float | None = None,
        decay_rate: float = 0.8,
        clip_threshold: float = 1.0,
        eps: float = 1e-30,
    ) -> None:
        self.beta1, self.decay_rate, self.d, self.eps = beta1, decay_rate, clip_threshold, eps
        self.r = self.c = self.v = 0.0
        self.m = np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        b2 = 1 - self.t ** (-self.decay_rate)
        squared = g**2 + self.eps
        if g.ndim >= 2:
            self.r = b2 * self.r + (1 - b2) * squared.sum(-1)
            self.c = b2 * self.c + (1 - b2) * squared.sum(-2)
            total = self.r.sum(-1)[..., None, None]
            v = self.r[..., :, None] * self.c[..., None, :] / total
        else:
            self.v = b2 * self.v + (1 - b2) * squared
            v = self.v
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt(np.mean(u**2)) / self.d)
        if self.beta1 is None:
            return u
        self.m = self.beta1 * self.m + (1 - self.beta1) * u
        return self.m


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


RULES: dict[str, type[Reference]] = {
    "sgd": SGD,
    "signum": Signum,
    "lion": Lion,
    "adamw": AdamW,
    "adafactor": Adafactor,
    "muon": Muon,
    "soap": SOAP,
}
