"""Kronecker-factored preconditioners, from their papers."""

from __future__ import annotations

import numpy as np

from references.base import Array, Reference

TINY = float(np.finfo(np.float32).tiny)
"""Least size that Kron divides by."""


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


class Shampoo(Reference):
    """Gupta, Koren & Singer 2018 (arXiv:1802.09568), as practised: Anil et al. 2020
    (arXiv:2002.09018) and Shi et al. 2023 (arXiv:2309.06497, facebookresearch/optimizers).

    m <- b1 m + (1 - b1) G, m_hat = m / (1 - b1^t);
    L <- b L + (1 - b) G G^T, R likewise with G^T G, b = `shampoo_beta` (betas[1] if None), divided
    by 1 - b^t before roots; `accumulate` = "sum": L <- L + G G^T, undivided (2018);
    P = (L + eps I)^-e m_hat (R + eps I)^-e, e = `exponent`; u = P |D| / (|P| + 1e-16), D the
    direction of the grafted method: "adam" m_hat / (sqrt(v_hat) + graft_eps), "sgd" m_hat;
    "none": u = P. Norms are of the whole tensor.

    * Ridge: eps I is added to the (corrected) factor, before the root, at each root. With "sum" it
      is the 2018 paper's L_0 = eps I. Rounding's negative eigenvalues are raised to zero before.
    * Exponent: one over twice the number of factors (2018: 1/4 for a matrix).
    * A side longer than `max_precond_dim` has no factor, and the other's exponent is then 1/2:
      2002.09018's L^(-1/2p) G R^(-1/2q), 1/p + 1/q = 1, at p = 1, and the exponent of Google's
      code where one side is left out. (Meta's cuts the matrix in blocks; not offered.)
    * Roots are computed at step `start_preconditioning_step` and then at every later multiple of
      `update_interval`, from factors with that step's gradient. None is `update_interval`, Meta's
      default; before it u = D ("none": u = m_hat, the roots are identities).
    * No factors (vectors, scalars, both sides too long): u = D; "none": the diagonal of the one
      factor such a tensor would have, m_hat / sqrt(v + eps), v as L ("sum": sums of squares).
    * Decay is decoupled (Meta: an option). Meta's second momentum (0 by default) is left out.

    Until it has seen side / (other side) gradients a factor is singular, and then eps = 1e-12 to
    the power -1/4 multiplies by 1000 what stale roots find in its null space. Measured over 32
    steps, 4 x 64, `update_interval` 5: float32 roots move the result by 0.5 at eps = 1e-12, 1e-2
    at 1e-6, 2e-4 at 1e-4 and 2e-6 at 1e-2; with float64 roots, float32 noise in the gradients
    moves it by 6e-4 at 1e-12 and 1e-7 from 1e-8 on. 24 x 16 isn't singular at its first roots:
    7e-8 everywhere.

    Different: torch_optimizer has exponent 1 / number of factors (1/2 for a matrix: here
    `exponent` = 0.5), takes the right factor from the gradient that the left one has already
    preconditioned, and averages that too; kozistr's ScalableShampoo, after Google's, grafts G
    with SGD, AdaGrad or RMSProp, before heavy-ball momentum; the "Shampoo" of
    OpenRaiser/scaling-for-scaling is Newton-Schulz of Adam's direction.

    Defaults: lr 1e-3, weight_decay 1e-5
    """

    def setup(
        self,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        shampoo_beta: float | None = None,
        eps: float = 1e-12,
        exponent: float | None = None,
        accumulate: str = "ema",
        grafting: str = "adam",
        graft_eps: float = 1e-8,
        update_interval: int = 100,
        start_preconditioning_step: int | None = None,
        max_precond_dim: int = 8192,
    ) -> None:
        assert accumulate in {"ema", "sum"}
        assert grafting in {"adam", "sgd", "none"}
        self.b1, self.b2 = betas
        self.beta = self.b2 if shampoo_beta is None else shampoo_beta
        self.eps, self.graft_eps, self.grafting = eps, graft_eps, grafting
        self.summed, self.interval = accumulate == "sum", update_interval
        first = start_preconditioning_step
        self.start = update_interval if first is None else first
        self.m, self.v, self.squares = (np.zeros_like(self.x) for _ in range(3))
        sides = (len(self.x), self.x[0].size) if self.x.ndim >= 2 else ()
        kept = [axis for axis, side in enumerate(sides) if side <= max_precond_dim]
        self.factors = {axis: np.zeros((sides[axis], sides[axis])) for axis in kept}
        self.roots = {axis: np.eye(sides[axis]) for axis in kept}
        self.exponent = 1 / (2 * max(len(kept), 1)) if exponent is None else exponent

    def direction(self, g: Array) -> Array:
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m_hat = self.m / (1 - self.b1**self.t)
        if not self.factors and self.grafting == "none":
            self.squares = self.accumulated(self.squares, g**2)
            return m_hat / np.sqrt(self.corrected(self.squares) + self.eps)
        grafted = m_hat
        if self.grafting == "adam":
            grafted = m_hat / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.graft_eps)
        if not self.factors:
            return grafted
        p = self.preconditioned(g.reshape(len(g), -1), m_hat.reshape(len(g), -1))
        if self.t < self.start:
            return grafted
        if self.grafting != "none":
            p = p * np.linalg.norm(grafted) / (np.linalg.norm(p) + 1e-16)
        return p.reshape(g.shape)

    def preconditioned(self, g: Array, m_hat: Array) -> Array:
        """Take a gradient into the factors, and return P."""
        grams = {0: g @ g.T, 1: g.T @ g}
        self.factors = {a: self.accumulated(f, grams[a]) for a, f in self.factors.items()}
        if self.t == self.start or (self.t > self.start and self.t % self.interval == 0):
            self.roots = {axis: self.root(factor) for axis, factor in self.factors.items()}
        p = self.roots[0] @ m_hat if 0 in self.roots else m_hat
        return p @ self.roots[1] if 1 in self.roots else p

    def accumulated(self, old: Array, new: Array) -> Array:
        return old + new if self.summed else self.beta * old + (1 - self.beta) * new

    def corrected(self, total: Array) -> Array:
        return total if self.summed else total / (1 - self.beta**self.t)

    def root(self, factor: Array) -> Array:
        """Return (factor + eps I)^-exponent, the factor corrected."""
        values, vectors = np.linalg.eigh(self.corrected(factor))
        values = values - min(values[0], 0.0) + self.eps
        return vectors * values**-self.exponent @ vectors.T


class Kron(Reference):
    """PSGD Kron: Li 2015 (arXiv:1512.04202), as evanatyourservice/kron_torch, which is what the
    name means; equations of Li's repository lixilinx/psgd_torch ("dQ = E Q").

    m <- b m + (1 - b) G, M = m / (1 - b^t), flattened to rows x columns; Q_1, Q_2 start from
    `precond_init_scale`^(1 / dimensions) times I; V is N(0, 1); where the A and B below have the
    same second moments nothing moves:

      X = M (or G: `momentum_into_precond_update`) + sqrt(2^-23) mean|X| V
      A = Q_1 X Q_2^T,  B = Q_1^-T V Q_2^-1
      S_1 = A A^T - B B^T, T_1 = A A^T + B B^T;  S_2 = A^T A - B^T B, T_2 likewise
      Q_i <- Q_i - precond_lr triu(S_i) Q_i / bound(T_i)       (both from the same A and B)
      u = P / max(1, (rms(P) + 1e-12) / clip_threshold),  P = Q_1^T Q_1 M Q_2^T Q_2, new Q

    bound(T) <= |T|_2: with a the column of T of largest norm, y = T a, |T y| / |y|. A diagonal Q_i
    (a vector) takes the diagonals of S_i and T_i, and bound = largest of T_i's. The noise in X,
    3e-4 of it, is part of the method: sqrt(2^-23) is the constant whatever the precision.

    * Diagonal: sides of 1, sides longer than `max_size_triangular`, vectors and scalars (one
      Q of the tensor's shape); with `memory_save_mode` "one_diag" the longest side too (the
      second of two equals).
    * Q is updated at the first step by which 1 / p(t) steps have passed since the last update,
      p = max(min(p_0 exp(-`probability_decay` (t - 1 - `probability_start`)), p_0), p_1),
      (p_0, p_1) = `probability`: no draw. At each 100th update the Q of matrices are first
      balanced: each is multiplied by (geometric mean of both largest |entries|) / (its own).
    * Draws. At a step that updates, each parameter draws V = draw("normal", t, shape), the
      tensor's own shape.
    * Decay is decoupled, lr outside.

    Different: kron_torch 0.3.3 counts steps of the optimizer, not of the parameter, balances one
    update in 100 by Python's random numbers, decays matrices only, and X's noise goes in place
    into M, so that P has it too (1e-4 after 32 steps); more dimensions are folded first-against-
    rest or rest-against-last; scalars make it fail.
    Newer psgd_torch divides by a running maximum of bound, and its default is another step,
    Q <- Q E. The momentum of Li's own KronWhiten is 0 by default.

    The column of largest norm may be another one in another precision (near-ties): then bound
    changes by a few percent.

    Defaults: lr 3e-4, weight_decay 0
    """

    def setup(
        self,
        *,
        momentum: float = 0.9,
        precond_lr: float = 0.1,
        precond_init_scale: float = 1.0,
        probability: tuple[float, float] = (1.0, 0.03),
        probability_decay: float = 1e-3,
        probability_start: int = 500,
        clip_threshold: float = 1.1,
        max_size_triangular: int = 8192,
        memory_save_mode: str | None = None,
        momentum_into_precond_update: bool = True,
    ) -> None:
        assert memory_save_mode in (None, "one_diag")
        self.b, self.precond_lr, self.clip = momentum, precond_lr, clip_threshold
        self.schedule = (*probability, probability_decay, probability_start)
        self.fits_momentum = momentum_into_precond_update
        self.waited = self.updates = 0
        shape = self.x.shape
        self.sides = (shape[0], self.x[0].size) if len(shape) >= 2 else (self.x.size,)
        self.m = np.zeros(self.sides)
        scale = precond_init_scale ** (1 / len(self.sides))
        longest = max(range(len(self.sides)), key=lambda axis: (self.sides[axis], axis))
        self.q: list[Array] = []
        for axis, side in enumerate(self.sides):
            flat = len(self.sides) == 1 or side == 1 or side > max_size_triangular
            flat = flat or (memory_save_mode == "one_diag" and axis == longest)
            self.q.append(scale * (np.ones(side) if flat else np.eye(side)))

    def direction(self, g: Array) -> Array:
        g = g.reshape(self.sides)
        self.m = self.b * self.m + (1 - self.b) * g
        m_hat = self.m / (1 - self.b**self.t)
        if self.due():
            self.updates += 1
            if self.updates % 100 == 0 and len(self.q) == 2:
                self.balance()
            assert self.draw is not None
            v = self.draw("normal", self.t, self.sides)
            h = m_hat if self.fits_momentum else g
            self.fit(h + np.sqrt(2.0**-23) * np.mean(np.abs(h)) * v, v)
        p = m_hat
        for axis, q in enumerate(self.q):
            p = applied(q.T @ q if q.ndim == 2 else q**2, p, axis)
        p = p * min(1.0, self.clip / (np.sqrt(np.mean(p**2)) + 1e-12))
        return p.reshape(self.x.shape)

    def due(self) -> bool:
        """Say whether the factors are updated at this step."""
        most, least, decay, start = self.schedule
        self.waited += 1
        if self.waited < 1 / max(min(most * np.exp(-decay * (self.t - 1 - start)), most), least):
            return False
        self.waited = 0
        return True

    def balance(self) -> None:
        sizes = [float(np.abs(q).max()) for q in self.q]
        mean = np.sqrt(sizes[0] * sizes[1])
        self.q = [q * mean / size for q, size in zip(self.q, sizes, strict=True)]

    def fit(self, h: Array, v: Array) -> None:
        """Move the factors once along their relative gradients."""
        a, b = h, v
        for axis, q in enumerate(self.q):
            a = applied(q, a, axis)
            b = applied(np.linalg.inv(q).T if q.ndim == 2 else 1 / q, b, axis)
        for axis, q in enumerate(self.q):
            aa, bb = (gram(x if axis == 0 else x.T, q.ndim) for x in (a, b))
            if q.ndim == 1:
                size = np.max(np.abs(aa + bb))
                self.q[axis] = q - self.precond_lr * (aa - bb) / max(size, TINY) * q
            else:
                size = spectral_bound(aa + bb)
                self.q[axis] = q - self.precond_lr * np.triu(aa - bb) / max(size, TINY) @ q


def applied(q: Array, x: Array, axis: int) -> Array:
    """Return q times x along an axis, q a matrix or a diagonal."""
    if q.ndim == 2:
        return q @ x if axis == 0 else x @ q.T
    return q * x if axis == x.ndim - 1 else q[:, None] * x


def gram(x: Array, ndim: int) -> Array:
    """Return x x^T, or its diagonal."""
    rows = x.reshape(len(x), -1)
    return rows @ rows.T if ndim == 2 else np.sum(rows**2, axis=1)


def spectral_bound(t: Array) -> float:
    """Return a lower bound of the largest eigenvalue of a positive semidefinite matrix."""
    y = t @ t[:, np.argmax(np.sum(t**2, axis=0))]
    size = float(np.linalg.norm(y))
    return float(np.linalg.norm(t @ y)) / size if size > 0 else 0.0


REFERENCES: dict[str, type] = {"soap": SOAP, "shampoo": Shampoo, "kron": Kron}
