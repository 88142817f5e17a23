"""Dion, and Scion's linear minimisation oracles, from their papers."""

from __future__ import annotations

import numpy as np

from references.base import Array, Reference, SignMethod
from references.orthogonal import newton_schulz


class Dion(Reference):
    """Ahn et al. 2025 (arXiv 2504.05295), undistributed: low-rank orthonormal updates.

    For hidden matrices [out, in] (more dimensions: the first against the rest), AdamW elsewhere:
        B = M + G;  P = the Q factor of QR(B Q);  R = B^T P;  M <- B - (1 - mu) P R^T
        Q <- each column of R / (its norm + eps);  u = sqrt(out / in) P Q^T
    B is not reduced, so M is no average: what rank r does not see stays in it whole. The signs of
    QR's columns cancel, in P R^T and P Q^T. Decay is lr wd, by the unscaled rate.

    `rank` is capped by both sides. The authors' code has rank_fraction, r = ceil(fraction x the
    shorter side) (1 by default, 1/4 and less in the paper's tables), dion_simple.py `rank` 768.

    The first Q [in, r] is normal: drawn once, draw("normal", 1, (in, r)), at the first step before
    anything else, whatever the gradient. Its size is irrelevant (QR).

    B = 0 moves nothing and keeps Q (the authors' guard). If B has a rank less than r, QR completes
    P arbitrarily, R has columns of rounding error, and eps alone (not scaled by B) keeps them from
    being normalised to one: such steps are not determined in float32.

    Different: the authors' distributed Dion transposes wide matrices (out < in), so that P has the
    longer side: another method than the algorithm and their dion_simple.py, and ours, except where
    out >= in. It has randomised Cholesky QR (the same P) and RMS-to-RMS scaling as here.

    Defaults: lr 0.01, weight_decay 0.01
    """

    def setup(self, momentum: float = 0.95, rank: int = 768, eps: float = 1e-8) -> None:
        self.mu, self.eps = momentum, eps
        self.m = np.zeros((len(self.x), self.x[0].size))
        self.rank = min(rank, *self.m.shape)

    def direction(self, g: Array) -> Array:
        rows, columns = self.m.shape
        if self.t == 1:
            self.q = np.asarray(self.draw("normal", 1, (columns, self.rank)), dtype=np.float64)
        b = self.m + g.reshape(rows, columns)
        if not b.any():
            return np.zeros_like(g)
        p = np.linalg.qr(b @ self.q)[0]
        r = b.T @ p
        self.m = b - (1 - self.mu) * p @ r.T
        self.q = r / (np.linalg.norm(r, axis=0) + self.eps)
        return (np.sqrt(rows / columns) * p @ self.q.T).reshape(g.shape)


RMS_EPS = 1e-8
"""What the authors' Scion adds to every norm that it divides by; not an option there."""


class Scion(SignMethod):
    """Pethick et al. 2025 (arXiv 2502.07529), Algorithm 3; github.com/LIONS-EPFL/scion for norms.

    m <- (1 - a) m + a g from zero, where a, `momentum`, is the weight of the NEW gradient: theirs,
    one minus anybody else's momentum (1: no memory);  then, with rho = `scale`,
        constrained:    x <- (1 - lr) x - lr rho lmo(m)
        unconstrained:  x <- x - lr rho lmo(m)
    lmo is the ball's extreme point towards m, the paper's with the sign turned. By `norm`:
        spectral  sqrt(out / in) NS(m), Jordan's quintic, `ns_steps`; a convolution is flattened
                  for NS, `in` is its input channels and the result is divided by the kernel's size
        sign      sign(m) / in, the columns of the matrix
        column    every row of [vocab, hidden] / (its RMS + 1e-8): one column of the paper's matrix,
                  ColNorm(transpose=True) of the code (for tokens, the input layer)
        row       every row of [out, in] / (in RMS + 1e-8), RowNorm() of the code: norm 1 / sqrt(in)
        rms       m / (RMS of the tensor + 1e-8), BiasRMS: vectors and scalars
    weight_decay is on top of the constraint, which is decay 1 already; leave it at 0.

    Roles, the authors' nanoGPT (constrained, tied, GPT-2 124M, no gains): hidden "spectral" 50;
    head, and embedding tied to it, "sign" 3000, lr 3.6e-4. Untied embeddings: "column", meant for
    one-hot inputs, with the hidden radius (we found none of the authors' for untied LLMs; EPFL's
    benchmark has 1, 3, 10 for embedding, hidden, head). Vectors: "rms" with the hidden radius,
    what the code's norm Auto does. AdamW for nothing. The authors can start weights on the balls.

    Different: EPFL's benchmark takes max(1, sqrt(out / in)), unnormalised sign, momentum 0.9 which
    here means nearly none, and its ColNorm divides by sqrt(vocab); kozistr's are these, but it is
    unconstrained with scale 1 by default; levanter's Scion is Signum on embeddings and head.

    Defaults: lr 3.6e-4, weight_decay 0
    """

    def setup(
        self,
        momentum: float = 0.1,
        norm: str = "spectral",
        scale: float = 50.0,
        constrained: bool = True,
        ns_steps: int = 5,
    ) -> None:
        super().setup()
        self.alpha, self.norm, self.scale = momentum, norm, scale
        self.constrained, self.ns_steps = constrained, ns_steps

    def average(self, g: Array) -> None:
        self.m = (1 - self.alpha) * self.m + self.alpha * g
        self.size = (1 - self.alpha) * self.size + self.alpha * np.abs(g)

    def direction(self, g: Array) -> Array:
        self.average(g)
        u = self.scale * self.lmo(self.m)
        return u + self.x if self.constrained else u

    def lmo(self, m: Array) -> Array:
        if self.norm == "spectral":
            o = newton_schulz(m.reshape(len(m), -1), self.ns_steps).reshape(m.shape)
            return np.sqrt(m.shape[0] / m.shape[1]) / np.prod(m.shape[2:]) * o
        if self.norm == "sign":
            return self.sign(m, self.size) / (m[0].size if m.ndim > 1 else m.size)
        if self.norm == "rms":
            return m / (np.sqrt(np.mean(m**2)) + RMS_EPS)
        rows = m.reshape(len(m), -1) if m.ndim > 1 else m.reshape(1, -1)
        rms = np.sqrt(np.mean(rows**2, axis=1, keepdims=True))
        if self.norm == "column":
            return (rows / (rms + RMS_EPS)).reshape(m.shape)
        if self.norm == "row":
            return (rows / (rows.shape[1] * rms + RMS_EPS)).reshape(m.shape)
        raise ValueError(self.norm)


class ScionLight(Scion):
    """Scion without a state of its own (same paper and code): the average is in the gradient.

    d <- (1 - a) d + g, and the step is along lmo(d). d = m / a, and every lmo forgets the factor,
    so it is Scion, up to the eps of norms. The buffer is `.grad` itself: backward adds to it, the
    step reads it and then multiplies it by 1 - a; it must not be zeroed, and whoever clips or
    reads gradients between the two has the average. Here `step` takes the new gradient alone.

    (With a = 1 their code leaves the gradient as it is and counts on its being zeroed; here it
    is forgotten.) EPFL's loop zeroes gradients, so their scion-light has no momentum.

    Defaults: lr 3.6e-4, weight_decay 0
    """

    def average(self, g: Array) -> None:
        self.m = (1 - self.alpha) * self.m + g
        self.size = (1 - self.alpha) * self.size + np.abs(g)


REFERENCES: dict[str, type] = {"dion": Dion, "scion": Scion, "scion_light": ScionLight}
