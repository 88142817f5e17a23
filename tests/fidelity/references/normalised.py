"""Methods that normalise a gradient by its own rows, columns or singular values."""

from __future__ import annotations

import numpy as np

from references.base import Array, Reference


def row_norms(matrix: Array) -> Array:
    """Return the Euclidean norm of each row, as a column."""
    return np.sqrt(np.sum(matrix**2, axis=1, keepdims=True))


class RMNP(Reference):
    """Deng et al. 2026 (arXiv 2603.20527): Muon with rows normalised instead of Newton-Schulz.

    V <- mu V + G;  y = G + mu V with nesterov, else V;  every row of y / max(its norm, eps), times
    sqrt(max(1, rows / columns)).  For hidden matrices [out, in] (more dimensions: first against
    the rest), AdamW for the rest. Decay decoupled. Tall matrices are not transposed.

    The algorithm has the average (1 - mu) G, no Nesterov and no factor of shape: nesterov=False,
    shape_scale=False. The defaults are the authors' code (Dominator-Index/RMNP, GPT-2/RMNP), with
    which their rates were tuned: matrices 2e-3 to 5e-3, wd 0.1 (class default lr 0.02, wd 0).
    The factor 1 - mu is forgotten, up to eps, their normalize's 1e-12.

    Different: microsoft/dion follows the paper, eps 1e-8 added to norms; Scaling for Scaling runs
    it on embedding and head too, where a row without gradient moves on at full speed.

    Defaults: lr 4e-3, weight_decay 0.1
    """

    def setup(
        self,
        momentum: float = 0.95,
        nesterov: bool = True,
        shape_scale: bool = True,
        eps: float = 1e-12,
    ) -> None:
        self.mu, self.nesterov, self.shape_scale, self.eps = momentum, nesterov, shape_scale, eps
        self.v = np.zeros((len(self.x), self.x[0].size))

    def direction(self, g: Array) -> Array:
        matrix = g.reshape(self.v.shape)
        self.v = self.mu * self.v + matrix
        y = matrix + self.mu * self.v if self.nesterov else self.v
        rows, columns = y.shape
        factor = np.sqrt(max(1.0, rows / columns)) if self.shape_scale else 1.0
        return (factor * y / np.maximum(row_norms(y), self.eps)).reshape(g.shape)


class SWAN(Reference):
    """Ma et al. 2024 (arXiv 2412.13148), Algorithms 1-3: normalised, whitened gradient; no state.

    For hidden matrices [out, in] = [m, n] (more dimensions: first against the rest), Adam for
    embedding, head, vectors:
        GradNorm        N = rows of G less their mean, / (their standard deviation + eps)
        GradWhitening   W = (N N^T)^(-1/2) N, nearly, by `ns_steps` Newton-Schulz steps
                        Y <- beta Y (3 - Z Y), Z <- beta (3 - Z Y) Z at once, from Y = N N^T and
                        Z = 1, then Z N; from the shorter side (the paper has m <= n)
        u = scale sqrt(m n) W / (||W||_F + eps): element RMS `scale`, ||N||_F being sqrt(m n)
    On singular values the iteration is s <- beta s (3 - s^2), so that is how it is written here.
    With beta = 1/2 it converges to 1; the paper's 0.8 (10 steps) grows faster, and wanders in
    [0.5, 1.6] for ever after, magnifying rounding errors by up to 2.4 a step.

    N / (||N||_F + eps) is what enters: the iteration needs s < sqrt(3) and N's reach sqrt(m n).
    The algorithm is silent; two of three public implementations do it. No official code exists
    (msr_optim is announced only), so beta and steps are as two of them quote the paper.
    `center` False divides by the root mean square instead, no mean taken: later accounts of the
    method (SinkGD's section on SWAN, one implementation of v3) have it so.
    scale 0.05 with a global rate of 0.02 is SinkGD's setting for both (Adam without the scale).

    Different: v3's cheaper SWAN with diagonals in the iteration (beta 0.4, 2 steps): not offered.
    Float32 follows to about 1e-4 only: beta magnifies, and a centred matrix with m >= n has one
    singular value of exactly zero, where float32 has rounding errors.

    Defaults: lr 0.02, weight_decay 0
    """

    def setup(
        self,
        ns_steps: int = 10,
        beta: float = 0.8,
        scale: float = 0.05,
        center: bool = True,
        eps: float = 1e-8,
    ) -> None:
        self.ns_steps, self.beta, self.scale, self.eps = ns_steps, beta, scale, eps
        self.center = center

    def direction(self, g: Array) -> Array:
        n = g.reshape(len(g), -1)
        if self.center:
            n = n - np.mean(n, axis=1, keepdims=True)
        n = n / (np.sqrt(np.mean(n**2, axis=1, keepdims=True)) + self.eps)
        u, s, vt = np.linalg.svd(n / (np.linalg.norm(n) + self.eps), full_matrices=False)
        for _ in range(self.ns_steps):
            s = self.beta * s * (3 - s**2)
        factor = self.scale * np.sqrt(n.size) / (np.sqrt(np.sum(s**2)) + self.eps)
        return (factor * (u * s) @ vt).reshape(g.shape)


class SinkGD(Reference):
    """Scetbon et al. 2025 (arXiv 2502.06742), Algorithms 3 (SR-Sinkhorn) and 4; no state.

    For hidden matrices [m, n] (more dimensions: first against the rest), Adam for embedding, head
    and vectors. `iterations` times:
        every row of X    <- sqrt(n) row / max(its norm, eps)
        every column of X <- sqrt(m) column / max(its norm, eps)
    u = scale X, whose element RMS is scale: columns are normalised last, exactly. The paper has
    L = 5, a global rate of 0.02 and 0.05 of it for these matrices, and no eps: zeros stay zero.

    Different: adv-optm (SinkSGD) begins with columns where m > n, floors norms at
    1 / sqrt(length), gives vectors a sign, and has no 0.05; others divide by sqrt(m n).

    Defaults: lr 0.02, weight_decay 0
    """

    def setup(self, iterations: int = 5, scale: float = 0.05, eps: float = 1e-8) -> None:
        self.iterations, self.scale, self.eps = iterations, scale, eps

    def direction(self, g: Array) -> Array:
        x = g.reshape(len(g), -1)
        m, n = x.shape
        for _ in range(self.iterations):
            x = np.sqrt(n) * x / np.maximum(row_norms(x), self.eps)
            x = np.sqrt(m) * x / np.maximum(row_norms(x.T).T, self.eps)
        return (self.scale * x).reshape(g.shape)


class SCALE(Reference):
    """Glentis et al. 2025 (arXiv 2506.16659), Algorithm 1: normalised SGD, momentum in the head.

    m <- momentum m + (1 - momentum) g, from zero;  u = each output's part of m / max(its norm,
    eps): norm 1, the paper's unit. "Column" is of the paper's [in, out]; here by `norm`
        "row"     every row of [out, in]: linear layers and head
        "column"  every column of [vocab, hidden]: the embedding (a hidden unit's whole column)
    Roles: hidden "row", momentum 0; embedding "column", momentum 0; head "row", momentum 0.9.
    Vectors have Adam with its own rate. More dimensions: the first against the rest.
    With momentum 0 there is no state: m = g.

    Different: the authors' code (OptimAI-Lab/Minimalist_LLM_Pretraining) makes the root mean
    square 1, not the norm: u sqrt(in) of a row, u sqrt(vocab) of an embedding's column. So their
    lr 1e-3 is lr 1e-3 sqrt(in) here, 0.023 for 512 inputs but 0.18 for an embedding of 32000
    tokens: one rate does not translate into one rate.

    Defaults: lr 0.02, weight_decay 0
    """

    def setup(self, momentum: float = 0.0, norm: str = "row", eps: float = 1e-8) -> None:
        self.mu, self.norm, self.eps = momentum, norm, eps
        self.m = np.zeros((len(self.x), self.x[0].size))

    def direction(self, g: Array) -> Array:
        self.m = self.mu * self.m + (1 - self.mu) * g.reshape(self.m.shape)
        if self.norm == "row":
            norms = row_norms(self.m)
        elif self.norm == "column":
            norms = row_norms(self.m.T).T
        else:
            raise ValueError(self.norm)
        return (self.m / np.maximum(norms, self.eps)).reshape(g.shape)


REFERENCES: dict[str, type] = {"rmnp": RMNP, "swan": SWAN, "sinkgd": SinkGD, "scale": SCALE}
