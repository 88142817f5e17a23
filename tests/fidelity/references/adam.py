"""Adam and its family, from their papers."""

from __future__ import annotations

import numpy as np

from references.base import Array, GroupReference, Reference


class Coupled(Reference):
    """Base of methods whose decay is an L2 penalty: its gradient, wd x, is added to g."""

    def step(self, grad: Array, lr: float) -> None:
        self.t += 1
        g = np.asarray(grad, dtype=np.float64) + self.weight_decay * self.x
        self.x = self.x - lr * self.direction(g)


class AdamW(Reference):
    """Loshchilov & Hutter, Algorithm 2, with decay lr * wd as in torch (the paper's schedule
    multiplier eta is our lr divided by its alpha).

    `amsgrad` (Reddi, Kale & Kumar, ICLR 2018, arXiv 1904.09237) divides by the greatest v so far.
    Their Algorithm 2 has no bias corrections at all; torch's, which everybody means, takes the
    maximum of the uncorrected v and then corrects it by this step's 1 - b2^t, so the denominator
    may shrink early on. optax takes the maximum of the corrected v.

    Defaults: lr 1e-3, weight_decay 1e-2
    """

    def setup(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        amsgrad: bool = False,
    ) -> None:
        self.betas, self.eps, self.amsgrad = betas, eps, amsgrad
        self.m, self.v = np.zeros_like(self.x), np.zeros_like(self.x)
        self.v_max = np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        self.v_max = np.maximum(self.v_max, self.v)
        m_hat = self.m / (1 - b1**self.t)
        v_hat = (self.v_max if self.amsgrad else self.v) / (1 - b2**self.t)
        return m_hat / (np.sqrt(v_hat) + self.eps)


class Adam(Coupled, AdamW):
    """Kingma & Ba 2015 (arXiv 1412.6980), Algorithm 1; decay is L2, in g, as torch.optim.Adam's.

    The paper has no decay. Its faster form (end of section 2) does not correct eps, and neither
    do Hugging Face's former AdamW and others: theirs is eps / sqrt(1 - b2^t) here.

    Defaults: lr 1e-3, weight_decay 0
    """


class NAdam(Coupled):
    """Dozat 2016 (ICLR workshop, openreview OM0jvwB8jIp57ZJjtNEZ), as torch.optim.NAdam.

    mu_t = b1 (1 - 0.96^(t momentum_decay) / 2), and the direction is
    [mu_(t+1) m / (1 - mu_1...mu_(t+1)) + (1 - mu_t) g / (1 - mu_1...mu_t)] / (sqrt(v_hat) + eps).
    Dozat averages m with mu_t, torch and we with b1; his v_hat has one more factor b2, that
    nobody implements. Decay is L2, in g.

    momentum_decay = 0 means no schedule, mu_t = b1, here and in NAdamW. It is a special case and
    not the formula's value at 0, b1 / 2 for ever (torch); the formula tends to it as
    momentum_decay grows. Then the direction's numerator is
    b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t).

    Different: torch at momentum_decay = 0; see also NAdamW.

    Defaults: lr 2e-3, weight_decay 0
    """

    def setup(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum_decay: float = 4e-3,
    ) -> None:
        self.betas, self.eps, self.momentum_decay = betas, eps, momentum_decay
        self.m, self.v = np.zeros_like(self.x), np.zeros_like(self.x)
        self.product = 1.0

    def mu(self, t: int) -> float:
        if self.momentum_decay == 0:
            return self.betas[0]
        return self.betas[0] * (1 - 0.5 * 0.96 ** (t * self.momentum_decay))

    def direction(self, g: Array) -> Array:
        b1, b2 = self.betas
        now, after = self.mu(self.t), self.mu(self.t + 1)
        self.product *= now
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        m_hat = after * self.m / (1 - self.product * after) + (1 - now) * g / (1 - self.product)
        return m_hat / (np.sqrt(self.v / (1 - b2**self.t)) + self.eps)


class NAdamW(NAdam):
    """NAdam with decoupled decay, as torch.optim.NAdam(decoupled_weight_decay=True).

    With momentum_decay = 0, no schedule, it is optax.nadamw.

    Different: AlgoPerf's NAdamW, and timm's, correct both terms by 1 - b1^t (no schedule), so
    their first step is 1 + b1 = 1.9 times the sign where optax's is 1 + b1 / (1 + b1) = 1.47;
    the ratio tends to 1 as b1^t vanishes. Not offered.

    Defaults: lr 2e-3, weight_decay 1e-2
    """

    step = Reference.step


def rectification(t: int, beta2: float) -> float | None:
    """Return RAdam's r_t, or None where the average is too short (rho_t < 5) to rectify."""
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * t * beta2**t / (1 - beta2**t)
    if rho < 5:
        return None
    return np.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))


class RAdam(Reference):
    """Liu et al. 2020 (arXiv 1908.03265), Algorithm 2, with decoupled decay as the authors' code.

    r_t m_hat sqrt(1 - b2^t) / (sqrt(v) + eps) once rho_t >= 5, before that m_hat. The paper
    rectifies from rho_t > 4 and has no eps; the threshold 5 ("more conservative") and eps, which
    is not bias-corrected, are the authors' code and torch's (rho_t > 5: equal but for ties).

    Different: the authors' radam/radam.py and kozistr leave the parameter alone (no decay either)
    while rho_t < 5 unless `degenerated_to_sgd`; torch and optimi couple decay unless asked; optax
    corrects eps.

    Defaults: lr 1e-3, weight_decay 0
    """

    def setup(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.betas, self.eps = betas, eps
        self.m, self.v = np.zeros_like(self.x), np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        m_hat = self.m / (1 - b1**self.t)
        r = rectification(self.t, b2)
        if r is None:
            return m_hat
        return r * m_hat * np.sqrt(1 - b2**self.t) / (np.sqrt(self.v) + self.eps)


class AdaBelief(Reference):
    """Zhuang et al. 2020 (arXiv 2010.07468), Algorithm 2.

    s <- b2 s + (1 - b2) (g - m)^2 + eps, with the new m; eps stays in s, where it adds up to
    eps / (1 - b2), and is added again outside the root: m_hat / (sqrt(s_hat) + eps). The paper
    has no rectification. `rectify` is the default of the authors' package: RAdam's r_t with the
    root of s, uncorrected, plus eps; m_hat while rho_t < 5. Decoupled decay, the package's default.

    The default eps is the package's, 1e-16: s_hat is never below eps / (1 - b2), so the paper's
    1e-8 acts as Adam's 3e-3 would. In float32 any s > 2e-9 absorbs 1e-16, which is harmless.

    Different: optax has two of them, eps_root in s and eps outside; the authors' package and timm
    rectify by default; torch_optimizer's eps is 1e-8.

    Defaults: lr 1e-3, weight_decay 0
    """

    def setup(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        rectify: bool = False,
    ) -> None:
        self.betas, self.eps, self.rectify = betas, eps, rectify
        self.m, self.s = np.zeros_like(self.x), np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.s = b2 * self.s + (1 - b2) * (g - self.m) ** 2 + self.eps
        m_hat = self.m / (1 - b1**self.t)
        if not self.rectify:
            return m_hat / (np.sqrt(self.s / (1 - b2**self.t)) + self.eps)
        r = rectification(self.t, b2)
        if r is None:
            return m_hat
        return r * m_hat * np.sqrt(1 - b2**self.t) / (np.sqrt(self.s) + self.eps)


class LaProp(Reference):
    """Ziyin, Wang & Ueda 2020 (arXiv 2002.04839), Algorithm 1: momentum after normalisation.

    m <- b1 m + (1 - b1) g / (sqrt(v / (1 - b2^t)) + eps);  x -= lr m / (1 - b1^t).
    The learning rate is outside m, as in the paper and heavyball. The authors' code, timm and
    kozistr have it inside, with the correction (average of lr) / lr: the same at a constant rate
    only. Decay is decoupled; the authors' code does not multiply it by lr.

    Different: heavyball's eps is a floor of the root, not a term.

    Defaults: lr 4e-4, weight_decay 0
    """

    def setup(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-15) -> None:
        self.betas, self.eps = betas, eps
        self.m, self.v = np.zeros_like(self.x), np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        b1, b2 = self.betas
        self.v = b2 * self.v + (1 - b2) * g**2
        normalised = g / (np.sqrt(self.v / (1 - b2**self.t)) + self.eps)
        self.m = b1 * self.m + (1 - b1) * normalised
        return self.m / (1 - b1**self.t)


class RMSprop(Reference):
    """Tieleman & Hinton 2012 (Coursera, lecture 6e), `centered` by Graves (arXiv 1308.0850).

    As torch: v <- alpha v + (1 - alpha) g^2, no bias correction, eps outside the root, heavy ball
    of the normalised gradient with lr outside. (Graves and TensorFlow have lr inside the buffer
    and eps inside the root; so has optax, with an option for eps.) Centered: sqrt(v - a^2) with
    a <- alpha a + (1 - alpha) g; where rounding makes v - a^2 negative it is 0 (torch: NaN).
    Decay is decoupled, torch's is L2.

    Defaults: lr 1e-2, weight_decay 0
    """

    def setup(
        self,
        alpha: float = 0.99,
        momentum: float = 0.0,
        eps: float = 1e-8,
        centered: bool = False,
    ) -> None:
        self.alpha, self.mu, self.eps, self.centered = alpha, momentum, eps, centered
        self.v, self.a = np.zeros_like(self.x), np.zeros_like(self.x)
        self.buffer = np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        self.v = self.alpha * self.v + (1 - self.alpha) * g**2
        self.a = self.alpha * self.a + (1 - self.alpha) * g
        variance = np.maximum(self.v - self.a**2, 0) if self.centered else self.v
        self.buffer = self.mu * self.buffer + g / (np.sqrt(variance) + self.eps)
        return self.buffer


class Adagrad(Reference):
    """Duchi, Hazan & Singer 2011 (JMLR 12), Figure 1 with diagonal matrices and no regulariser.

    s <- s + g^2, from `initial_accumulator`;  x -= lr g / (sqrt(s) + eps), the paper's delta
    being eps. Decay is decoupled (torch's is L2); torch's lr_decay is left to the schedule.

    Different: TensorFlow and optax start s from 0.1, and optax has eps inside the root.

    Defaults: lr 1e-2, weight_decay 0
    """

    def setup(self, eps: float = 1e-10, initial_accumulator: float = 0.0) -> None:
        self.eps = eps
        self.s = np.full_like(self.x, initial_accumulator)

    def direction(self, g: Array) -> Array:
        self.s = self.s + g**2
        return g / (np.sqrt(self.s) + self.eps)


class AdaGradNorm(GroupReference):
    """Ward, Wu & Bottou 2019 (arXiv 1806.01811), Algorithm 1: one scalar for all parameters.

    b^2 <- b^2 + |G|^2, G all gradients together;  x -= lr G / b. `initial_accumulator` is b_0^2
    and must be positive, so there is no eps. Decay is decoupled, of each parameter; b does not
    see it. A rate of 1 is the paper's eta.

    Different: the authors' code (github.com/xwuShirley/pytorch, adagradnorm.py) has an
    accumulator per row of a matrix and per element of a vector, 1e-10 beside b, a momentum
    option, and a weight_decay that does nothing. Ours is the paper's.

    Defaults: lr 1.0, weight_decay 0
    """

    def setup(self, initial_accumulator: float = 1e-2) -> None:
        self.b_squared = initial_accumulator

    def step(self, grads: list[Array], lr: float) -> None:
        self.t += 1
        gs = [np.asarray(g, dtype=np.float64) for g in grads]
        self.b_squared += sum(float(np.sum(g**2)) for g in gs)
        b = np.sqrt(self.b_squared)
        self.xs = [
            x - lr * (g / b + wd * x)
            for x, g, wd in zip(self.xs, gs, self.weight_decays, strict=True)
        ]


class DiffGrad(Reference):
    """Dubey et al. 2019 (arXiv 1909.11015): Adam times a friction of the gradient's change.

    sigmoid(|g_(t-1) - g_t|) m_hat / (sqrt(v_hat) + eps), with g_0 = 0 and elementwise: between
    1/2 and 1, and not invariant to the gradient's scale (small gradients: Adam at lr / 2).
    Decay is decoupled (the paper has none, the authors' code an L2 option, 0 by default).

    Different: the authors' diffGrad.py, which they say made the paper's figures, keeps the
    gradient's storage, not a copy: where the storage is reused the change is always 0 and the
    step is half of Adam's. diffGrad_v2.py copies. Their code, torch_optimizer and kozistr do not
    bias-correct eps.

    Defaults: lr 1e-3, weight_decay 0
    """

    def setup(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.betas, self.eps = betas, eps
        self.m, self.v = np.zeros_like(self.x), np.zeros_like(self.x)
        self.previous = np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        friction = 1 / (1 + np.exp(-np.abs(self.previous - g)))
        self.previous = g.copy()
        m_hat = self.m / (1 - b1**self.t)
        return friction * m_hat / (np.sqrt(self.v / (1 - b2**self.t)) + self.eps)


REFERENCES: dict[str, type] = {
    "adam": Adam,
    "adamw": AdamW,
    "nadam": NAdam,
    "nadamw": NAdamW,
    "radam": RAdam,
    "adabelief": AdaBelief,
    "laprop": LaProp,
    "rmsprop": RMSprop,
    "adagrad": Adagrad,
    "adagrad_norm": AdaGradNorm,
    "diffgrad": DiffGrad,
}
