"""SGD and sign methods, from their papers."""

from __future__ import annotations

import numpy as np

from references.base import Array, Reference, SignMethod


class SGD(Reference):
    """Polyak's heavy ball, and Nesterov's in the form of Sutskever et al. (ICML 2013).

    Loshchilov & Hutter's SGDW (Algorithm 1) has the learning rate inside the buffer, torch and we
    have it outside: the same at a constant rate only.

    Defaults: lr 1e-3, weight_decay 0
    """

    def setup(self, momentum: float = 0.9, nesterov: bool = False) -> None:
        self.mu, self.nesterov = momentum, nesterov
        self.buffer = np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        self.buffer = self.mu * self.buffer + g
        return g + self.mu * self.buffer if self.nesterov else self.buffer


class SignSGD(SignMethod):
    """Bernstein et al. 2018 (arXiv 1802.04434), Algorithm 1: x <- x - lr sign(g). No state.

    The sign of zero is zero. The sign of one number is never in doubt: margin is 1 or infinite.

    Defaults: lr 1e-4, weight_decay 0
    """

    def setup(self) -> None:
        super().setup()

    def direction(self, g: Array) -> Array:
        return self.sign(g, np.abs(g))


class Signum(SignMethod):
    """Bernstein et al. 2018 (arXiv 1802.04434), Algorithm 2: m <- b m + (1 - b) g; x -= lr sign(m).

    `nesterov` is the variant of the EPFL benchmark (arXiv 2509.01440, Algorithm 6), from a zero
    buffer: B <- b B + g; x -= lr sign(g + b B). B is m / (1 - b), and a sign forgets the factor,
    so plainly sign(B) = sign(m) and sign(g + b B) = sign((1 - b) g + b m): keeping m is enough
    (while b < 1). That is also Lion with betas (b^2, b).

    Their code (src/optim/sign.py) starts the buffer from a copy of the parameter, not from zero.

    Defaults: lr 1e-4, weight_decay 0
    """

    def setup(self, momentum: float = 0.9, nesterov: bool = False) -> None:
        super().setup()
        self.beta, self.nesterov = momentum, nesterov

    def direction(self, g: Array) -> Array:
        if self.nesterov:
            self.m = self.beta * self.m + g
            self.size = self.beta * self.size + np.abs(g)
            return self.sign(g + self.beta * self.m, np.abs(g) + self.beta * self.size)
        self.m = self.beta * self.m + (1 - self.beta) * g
        self.size = self.beta * self.size + (1 - self.beta) * np.abs(g)
        return self.sign(self.m, self.size)


class Lion(SignMethod):
    """Chen et al., Algorithm 2: c = b1 m + (1 - b1) g;  x <- x - lr (sign(c) + wd x).

    Defaults: lr 1e-4, weight_decay 0
    """

    def setup(self, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().setup()
        self.betas = betas

    def direction(self, g: Array) -> Array:
        b1, b2 = self.betas
        u = self.sign(b1 * self.m + (1 - b1) * g, b1 * self.size + (1 - b1) * np.abs(g))
        self.m = b2 * self.m + (1 - b2) * g
        self.size = b2 * self.size + (1 - b2) * np.abs(g)
        return u


class LARS(Reference):
    """You, Gitman & Ginsburg 2017 (arXiv 1708.03888), Algorithm 1.

    ratio = trust_coefficient |w| / (|g| + wd |w|), v <- momentum v + lr ratio (g + wd w), w -= v:
    the learning rate is INSIDE the buffer, and the decay is coupled, inside the ratio and the
    buffer. The quadratic decay of the rate in Algorithm 1 is left to the schedule.

    The paper's ratio is per layer with no exception by shape, and the authors' NVCaffe
    (GetLocalRate) has one for every tensor, so vectors and scalars have theirs too. The usual
    exclusion of gains and biases, from ratio and decay, is a later habit. The ratio is 1 where
    |w| or |g| is zero (NVCaffe; Algorithm 1 is silent), so that a zero tensor can leave zero.

    Different: torch_optimizer, timm and kozistr have lr outside the buffer (the same at a constant
    rate only); kozistr gives vectors plain SGD; timm has no ratio at wd 0 unless `always_adapt`;
    torch_optimizer's coefficient is 0.01, with no ratio at wd 0; optax has lr inside, but divides
    by |g + wd w|.

    Defaults: lr 1.0, weight_decay 5e-4
    """

    def setup(self, momentum: float = 0.9, trust_coefficient: float = 1e-3) -> None:
        self.mu, self.eta = momentum, trust_coefficient
        self.v = np.zeros_like(self.x)

    def step(self, grad: Array, lr: float) -> None:
        self.t += 1
        g = np.asarray(grad, dtype=np.float64)
        w_norm, g_norm = np.sqrt(np.sum(self.x**2)), np.sqrt(np.sum(g**2))
        ratio = 1.0
        if w_norm > 0 and g_norm > 0:
            ratio = self.eta * w_norm / (g_norm + self.weight_decay * w_norm)
        self.v = self.mu * self.v + lr * ratio * (g + self.weight_decay * self.x)
        self.x = self.x - self.v


REFERENCES: dict[str, type] = {
    "sgd": SGD,
    "signsgd": SignSGD,
    "signum": Signum,
    "lion": Lion,
    "lars": LARS,
}
