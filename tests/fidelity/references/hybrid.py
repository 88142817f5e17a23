"""Methods that treat two subspaces of a matrix differently, from their papers."""

from __future__ import annotations

import numpy as np

from references.base import Array, Reference


class COSMOS(Reference):
    """Liu et al. 2025 (arXiv:2502.17410v3), Algorithm 1, scales as the authors' lliu606/COSMOS.

    G is [m, n] = [out, in], U [n, r] the leading eigenvectors of the average of G^T G, S their
    Rayleigh block [r, r], V [m, r]:

      M <- b1 M + (1 - b1) G
      first step: U = leading eigenvectors of G^T G, S = (1 - b2) U^T G^T G U; later
      U' = QR(b2 U S + (1 - b2) G^T G U)
      S' = U'^T (b2 U S U^T + (1 - b2) G^T G) U'
      V <- b2 V + (1 - b2) (G U')^2            (not rotated with U, as paper and code)
      A = [M U' / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps)] U'^T                  (SOAP)
      B = NS(M - M U' U'^T),  B <- B / (|B| + eps)                                 (Muon)
      C = A + gamma sqrt(m n) B;   u = sqrt(m n) C / (|C| + eps)

    so the step's root mean square is lr. NS is Muon's: five quintic iterations of
    X / (|X| + 1e-7). Where the paper differs from the code, ours is the code's: eps outside the
    root (paper: inside, over the corrected V), sqrt(m n) in the last line (paper: sqrt(n), the
    same but for a factor in lr), eps beside the norms.

    Rank is at most min(m, n). At the first step M has no part outside min(m, n) eigenvectors, and
    NS would orthogonalise rounding errors: a rest below 1e-12 |M| is zero. Signs of U cancel.
    Where eigenvalues r and r + 1 of the first G^T G are (nearly) equal, U is anyone's choice.
    Matrices only; more than two dimensions: first against the rest. The rest get AdamW; the code
    also gives it matrices with more than 10000 rows, and embeddings.

    `gamma` is the code's lr_ratio, which is both the weight of B (0.1) and the hidden matrices'
    rate beside the embeddings': with 1e-3 for AdamW ours is 1e-4. Decay is decoupled.

    Different: the code's GPT variant has U on the rows, its weights being [in, out], and splits
    fused QKV for NS; COSMOS_optim.py, in the same repository, has heavy-ball momentum with
    Nesterov instead of M, gamma fixed at 0.2, and decays; the others ignore weight_decay.
    COSMOS.py at 0450c56 does not write S and the later U to its state: it restarts from the first
    U, and S = 0, at every step.

    Defaults: lr 1e-4, weight_decay 0
    """

    def setup(
        self,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        rank: int = 64,
        gamma: float = 0.1,
        ns_steps: int = 5,
    ) -> None:
        self.betas, self.eps, self.gamma, self.ns_steps = betas, eps, gamma, ns_steps
        self.shape = (len(self.x), self.x[0].size)
        self.rank = min(rank, *self.shape)
        self.m = np.zeros(self.shape)
        self.v = np.zeros((self.shape[0], self.rank))

    def direction(self, g: Array) -> Array:
        b1, b2 = self.betas
        g = g.reshape(self.shape)
        self.track(g)
        u = self.u
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * (g @ u) ** 2
        inside = self.m @ u
        a = inside / (1 - b1**self.t) / (np.sqrt(self.v / (1 - b2**self.t)) + self.eps) @ u.T
        outside = self.m - inside @ u.T
        if np.linalg.norm(outside) < 1e-12 * np.linalg.norm(self.m):
            outside = np.zeros_like(outside)
        b = quintic(outside / (np.linalg.norm(outside) + 1e-7), self.ns_steps)
        return self.scaled(a + self.gamma * self.scaled(b)).reshape(self.x.shape)

    def scaled(self, matrix: Array) -> Array:
        """Return a matrix with a root mean square of 1."""
        return np.sqrt(matrix.size) * matrix / (np.linalg.norm(matrix) + self.eps)

    def track(self, g: Array) -> None:
        """Take a gradient into the leading eigenvectors and their block."""
        b2 = self.betas[1]
        gram = g.T @ g
        if self.t == 1:
            self.u = np.linalg.eigh(gram)[1][:, ::-1][:, : self.rank]
            self.s = (1 - b2) * self.u.T @ gram @ self.u
            return
        old = self.u @ self.s @ self.u.T
        self.u = np.linalg.qr((b2 * old + (1 - b2) * gram) @ self.u)[0]
        self.s = self.u.T @ (b2 * old + (1 - b2) * gram) @ self.u


def quintic(matrix: Array, steps: int) -> Array:
    """Return what Newton-Schulz steps of Jordan's polynomial make of the singular values."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ vt


REFERENCES: dict[str, type] = {"cosmos": COSMOS}
