"""Orthogonalised methods: Muon and those that put something before or after it.

All are for hidden matrices [out, in] (AdamW elsewhere), but OrthoAdam, which takes every tensor.
A tensor of more dimensions is a matrix of its first against the rest.
"""

from __future__ import annotations

import numpy as np

from references.base import Array, Reference

JORDAN = ((3.4445, -4.7750, 2.0315),)
"""Jordan's quintic a s + b s^3 + c s^5, the same at every step (see Muon)."""

POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Amsel, Persson, Musco & Gower 2025 (arXiv 2505.16932), Algorithm 1, before its safety factor."""

SAFETY = 1.01
"""Every polynomial of Polar Express but the last of the table takes s / 1.01, and the norm that
the matrix is first divided by is 1.01 times as great."""

NS_EPS = 1e-7


def polynomials(coefficients: str, steps: int) -> list[tuple[float, float, float]]:
    """Return (a, b, c) of each step; where the table ends its last line repeats."""
    if coefficients == "jordan":
        return [JORDAN[0]] * steps
    if coefficients != "polar_express":
        raise ValueError(coefficients)
    safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]
    table = [*safe, POLAR_EXPRESS[-1]]
    return [table[min(k, len(table) - 1)] for k in range(steps)]


def newton_schulz(matrix: Array, steps: int, coefficients: str = "jordan") -> Array:
    """Return x after x <- a x + b x x^T x + c (x x^T)^2 x at each step, from x / ||x||_F."""
    safety = SAFETY if coefficients == "polar_express" else 1.0
    x = matrix / (safety * np.linalg.norm(matrix) + NS_EPS)
    for a, b, c in polynomials(coefficients, steps):
        # The same polynomial from either side: from the shorter.
        if x.shape[0] <= x.shape[1]:
            gram = x @ x.T
            x = a * x + b * (gram @ x) + c * (gram @ gram @ x)
        else:
            gram = x.T @ x
            x = a * x + b * (x @ gram) + c * (x @ gram @ gram)
    return x


class Muon(Reference):
    """Jordan et al. 2024 (kellerjordan.github.io/posts/muon; github.com/KellerJordan/Muon).

    B <- mu B + (1 - mu) G;  u = sqrt(max(1, rows / columns)) NS((1 - mu) G + mu B), or NS(B).

    The blog post has B <- mu B + G, the repository this average. Orthogonalisation forgets the
    factor, up to eps. The repository scales convolution kernels by the last two dimensions, we
    (as the blog: "flatten the last three") by the flattened matrix. No decay in the blog, an
    option in the repository. All products are of float64: they have bfloat16.

    `coefficients`: "jordan", or "polar_express" (arXiv 2505.16932, Algorithm 1), whose eps is 1e-7
    too. kozistr's table of that name was computed anew (safety 1e-2 inside the optimisation), as
    modded-nanogpt's and nanochat's (2e-2); Dao's gram-newton-schulz has SAFETY 1.05.

    Defaults: lr 0.02, weight_decay 0
    """

    def setup(
        self,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        coefficients: str = "jordan",
    ) -> None:
        self.mu, self.nesterov = momentum, nesterov
        self.ns_steps, self.coefficients = ns_steps, coefficients
        self.buffer = np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        o = self.orthogonal(g)
        rows, columns = o.shape
        return (np.sqrt(max(1.0, rows / columns)) * o).reshape(g.shape)

    def orthogonal(self, g: Array) -> Array:
        self.buffer = self.mu * self.buffer + (1 - self.mu) * g
        update = (1 - self.mu) * g + self.mu * self.buffer if self.nesterov else self.buffer
        return newton_schulz(update.reshape(len(update), -1), self.ns_steps, self.coefficients)


class DMuon(Muon):
    """Liu et al. 2025, Moonlight (arXiv 2502.16982): Muon with decay, update matched to AdamW's.

    B <- mu B + G;  u = 0.2 sqrt(max(rows, columns)) NS(G + mu B), or NS(B);  x -= lr (u + wd x).

    The factor gives a full-rank update an element RMS of about 0.2. The paper's equations are
    without Nesterov; the authors' example (MoonshotAI/Moonlight, examples/toy_train.py) has it by
    default, and so have we. Decay is by lr, not by the scaled rate. The EPFL benchmark's d-muon
    gives the same matrices the same step, and no decay to vectors.

    Different: torch.optim.Muon and kozistr keep the average (1 - mu) G + mu B: equal but for eps.

    Defaults: lr 1e-3, weight_decay 0.1
    """

    def direction(self, g: Array) -> Array:
        o = self.orthogonal(g)
        return (0.2 * np.sqrt(max(o.shape)) * o).reshape(g.shape)

    def orthogonal(self, g: Array) -> Array:
        self.buffer = self.mu * self.buffer + g
        update = g + self.mu * self.buffer if self.nesterov else self.buffer
        return newton_schulz(update.reshape(len(update), -1), self.ns_steps, self.coefficients)


class NorMuon(Muon):
    """Li et al. 2025 (arXiv 2510.05491), Algorithm 1: Muon with a second moment per neuron (row).

    M <- mu M + (1 - mu) G;  O = NS(M);  v_i <- b2 v_i + (1 - b2) mean_j O_ij^2, from zero and
    not bias-corrected (the last factor forgets it);  Y = O / (sqrt(v) + eps) row by row;
    u = 0.2 sqrt(rows columns) Y / (||Y||_F + eps): element RMS 0.2.

    `scale` "rms" is that. "norm" is the authors' code (github.com/zichongli5/NorMuon):
    u = sqrt(max(1, rows / columns)) Y ||O||_F / (||Y||_F + eps), which has Muon's lr (0.02) and
    no decay. Their code also has Nesterov, the algorithm has not: `nesterov` is False by default.
    The algorithm has no eps in the last factor, their code has 1e-10 in both.

    Different: microsoft/dion has Polar Express, heavy ball without Nesterov, and the norm kept,
    times sqrt(rows / columns) or 0.2 sqrt(max(rows, columns)); kozistr has both scales, and keeps
    the norm by default; modded-nanogpt and nanochat take the mean along the longer side.

    Defaults: lr 1e-3, weight_decay 0.1
    """

    def setup(
        self,
        *,
        momentum: float = 0.95,
        beta2: float = 0.95,
        eps: float = 1e-10,
        nesterov: bool = False,
        ns_steps: int = 5,
        coefficients: str = "jordan",
        scale: str = "rms",
    ) -> None:
        super().setup(momentum, nesterov, ns_steps, coefficients)
        self.beta2, self.eps, self.scale = beta2, eps, scale
        self.v = np.zeros((len(self.x), 1))

    def direction(self, g: Array) -> Array:
        o = self.orthogonal(g)
        rows, columns = o.shape
        self.v = self.beta2 * self.v + (1 - self.beta2) * np.mean(o**2, axis=1, keepdims=True)
        y = o / (np.sqrt(self.v) + self.eps)
        norm = np.linalg.norm(y) + self.eps
        if self.scale == "rms":
            factor = 0.2 * np.sqrt(rows * columns) / norm
        elif self.scale == "norm":
            factor = np.sqrt(max(1.0, rows / columns)) * np.linalg.norm(o) / norm
        else:
            raise ValueError(self.scale)
        return (factor * y).reshape(g.shape)


class OrthoAdam(Reference):
    """What the Scaling for Scaling benchmark runs under the name Shampoo; there is no paper.

    m, v as Adam's;  matrices: u = NS(m / (sqrt(v / (1 - b2^t)) + eps)) / (1 - b1^t), with no
    factor of shape;  vectors and scalars: the same without NS, that is Adam.

    EVERY matrix, embedding and head too. The correction of m is outside NS (opt/shampoo.py), which
    forgets it inside: so the first steps of matrices are long, 1 / (1 - b1) = 10 times at t = 1.
    Decay is decoupled. Their NS is Jordan's, in bfloat16.

    Defaults: lr 1e-2, weight_decay 0
    """

    def setup(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        ns_steps: int = 5,
    ) -> None:
        self.betas, self.eps, self.ns_steps = betas, eps, ns_steps
        self.m, self.v = np.zeros_like(self.x), np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        u = self.m / (np.sqrt(self.v / (1 - b2**self.t)) + self.eps)
        if g.ndim >= 2:
            u = newton_schulz(u.reshape(len(u), -1), self.ns_steps).reshape(g.shape)
        return u / (1 - b1**self.t)


class Mudam(Reference):
    """Wen, Hall, Ma & Liang 2025 (arXiv 2509.02046)'s sweep `mudam`: one-sided Shampoo by
    Newton-Schulz. The paper's text has no definition: this is from the authors' code
    (levanter/optim/mudam.py, as ported to marin-community/marin lib/levanter).

    With G [out, in]; everything is on the input side, however long:
        M <- b1 M + G;  N = (1 - b1) (G + b1 M) / (1 - b1^(t+1)), or (1 - b1) M / (1 - b1^t)
        H <- b2 H + G^T G;  D = (1 - b2) H / (1 - b2^t)
        u = sqrt(max(rows, columns)) N D^(-1/2), about
    and D^(-1/2) by Jordan's quintic: Newton-Schulz orthogonalises N^T / k beside (D - N^T N /
    k^2)^(1/2), a wide matrix with D as its Gram matrix, and N's part of the result is D^(-1/2) N^T.
    In closed form u is N q((D + eps I) / f^2) / f, where q(l) is the product over the steps of
    w = a + b l + c l^2 with l <- l w^2 after each, and
        f^2 = ||D - N^T N / k^2||_F + ||N||_F^2 / k^2 + eps
    with k such that D - N^T N / k^2 is positive: k = (1 - b1) sqrt(((1 + b1)^2 +
    b1^4 / (1 - b1^2 / b2)) / (1 - b2)), without Nesterov (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)).
    (Cauchy's inequality gives b1^4 / b2 there; k is the code's, it only matters through f.)
    It needs b2 > b1^2. eps is absolute, on the scale of squared gradients: not scale-free.
    An implementation iterates X <- W X, P <- W P W with W = a + b A + c A^2, A = X X^T + P, from
    X = N^T / (k f), P = (D - N^T N / k^2 + eps I) / f^2, and returns k X.

    `reorthogonalise` is the code's `another_muon`: u <- NS(u / (||u||_F + eps)) before the shape
    factor, eps again the same; on in the sweep's best 130M 1x run only.

    Differs from the code in one thing, the only place where code and its own comment disagree:
    the port has D = H (1 - b2^t) / (1 - b2), the reciprocal of the correction in its comment (and
    in mudam3.py, where it is right): in the limit 400 times too great, a step 20 times too short,
    and by a factor that depends on shampoo_beta, which the published sweep's losses hardly do.
    Gradient clipping is of the Adam part only. Decay decoupled, times lr. Small dimensions that it
    would merge, and blocks, are not for matrices of usual sizes. The sweep's Adam part: beta1 .95,
    beta2 .98-.99, eps 1e-15, nesterov, clip 1.

    Defaults: lr 8e-3, weight_decay 0.2
    """

    def setup(
        self,
        *,
        momentum: float = 0.95,
        shampoo_beta: float = 0.95,
        eps: float = 1e-5,
        nesterov: bool = True,
        ns_steps: int = 5,
        reorthogonalise: bool = False,
    ) -> None:
        assert shampoo_beta > momentum**2
        self.b1, self.b2, self.eps = momentum, shampoo_beta, eps
        self.nesterov, self.ns_steps, self.again = nesterov, ns_steps, reorthogonalise
        self.m = np.zeros((len(self.x), self.x[0].size))
        self.h = np.zeros((self.m.shape[1],) * 2)
        tail = 1 - momentum**2 / shampoo_beta
        bound = (1 + momentum) ** 2 + momentum**4 / tail if nesterov else 1 / tail
        self.k = (1 - momentum) * np.sqrt(bound / (1 - shampoo_beta))

    def direction(self, g: Array) -> Array:
        matrix, b1, b2, t = g.reshape(self.m.shape), self.b1, self.b2, self.t
        self.m = b1 * self.m + matrix
        self.h = b2 * self.h + matrix.T @ matrix
        n = (1 - b1) * self.m / (1 - b1**t)
        if self.nesterov:
            n = (1 - b1) * (matrix + b1 * self.m) / (1 - b1 ** (t + 1))
        d = (1 - b2) * self.h / (1 - b2**t)
        gram = n.T @ n / self.k**2
        f = np.sqrt(np.linalg.norm(d - gram) + np.trace(gram) + self.eps)
        values, vectors = np.linalg.eigh((d + self.eps * np.eye(len(d))) / f**2)
        q = np.ones_like(values)
        for a, b, c in polynomials("jordan", self.ns_steps):
            w = a + b * values + c * values**2
            q, values = q * w, values * w**2
        u = n @ (vectors * q) @ vectors.T / f
        if self.again:
            u = u / (np.linalg.norm(u) + self.eps)
            for a, b, c in polynomials("jordan", self.ns_steps):
                u = a * u + b * (u @ u.T @ u) + c * (u @ u.T @ u @ u.T @ u)
        return (np.sqrt(max(u.shape)) * u).reshape(g.shape)


REFERENCES: dict[str, type] = {
    "muon": Muon,
    "d_muon": DMuon,
    "normuon": NorMuon,
    "ortho_adam": OrthoAdam,
    "mudam": Mudam,
}
