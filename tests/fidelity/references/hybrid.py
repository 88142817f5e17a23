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
        rows, columns = len(self.x), self.x[0].size
        self.rank = min(rank, rows, columns)
        self.m = np.zeros((rows, columns))
        self.v = np.zeros((rows, self.rank))
        self.u = np.zeros((columns, self.rank))
        self.s = np.zeros((self.rank, self.rank))

    def direction(self, g: Array) -> Array:
        shape, g = g.shape, g.reshape(len(g), -1)
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.follow(g)
        u = self.u
        self.v = b2 * self.v + (1 - b2) * (g @ u) ** 2
        inside = self.m @ u
        m_hat = inside / (1 - b1**self.t)
        a = m_hat / (np.sqrt(self.v / (1 - b2**self.t)) + self.eps) @ u.T
        rest = self.m - inside @ u.T
        if np.linalg.norm(rest) <= 1e-12 * np.linalg.norm(self.m):
            rest = np.zeros_like(rest)
        b = newton_schulz(rest, self.ns_steps)
        scale = np.sqrt(g.size)
        c = a + self.gamma * scale * b / (np.linalg.norm(b) + self.eps)
        return (scale * c / (np.linalg.norm(c) + self.eps)).reshape(shape)

    def follow(self, g: Array) -> None:
        """Take a gradient into the leading eigenvectors and their block."""
        b2 = self.betas[1]
        gram = g.T @ g
        if self.t == 1:
            self.u = np.linalg.eigh(gram)[1][:, ::-1][:, : self.rank]
            self.s = (1 - b2) * self.u.T @ gram @ self.u
            return
        u = np.linalg.qr(b2 * self.u @ self.s + (1 - b2) * gram @ self.u)[0]
        self.s = u.T @ (b2 * self.u @ self.s @ self.u.T + (1 - b2) * gram) @ u
        self.u = u


def newton_schulz(matrix: Array, steps: int) -> Array:
    """Return about U V^T of a matrix U S V^T, by Muon's polynomial of its singular values."""
    x = matrix / (np.linalg.norm(matrix) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


REFERENCES: dict[str, type] = {"cosmos": COSMOS}
