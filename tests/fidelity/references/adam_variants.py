"""Variants of Adam, from their papers."""

from __future__ import annotations

import math

import numpy as np

from references.base import Array, Reference


class AdamMoments(Reference):
    """What most of them share: m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2."""

    def setup(self, betas: tuple[float, float], eps: float) -> None:
        self.betas, self.eps = betas, eps
        self.m, self.v = np.zeros_like(self.x), np.zeros_like(self.x)

    def average(self, g: Array) -> tuple[float, float]:
        """Take a gradient into both moments; return the bias corrections 1 - b1^t, 1 - b2^t."""
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        return 1 - b1**self.t, 1 - b2**self.t


class AdamP(AdamMoments):
    """Heo et al. 2021 (arXiv:2006.08217), Algorithm 2, with the test of the authors' code.

    Defaults: lr 1e-3, weight_decay 0
    Where the gradient is nearly orthogonal to the weights, as those of scale-invariant weights
    are, the update loses its radial part and the decay is multiplied by `wd_ratio`. Authors'
    code (PyPI adamp): first by rows (the first dimension against the rest), if the largest
    |cos(g_i, x_i)| of any row is below delta / sqrt(columns); else as one vector, if |cos(g, x)| is
    below delta / sqrt(size); else nothing. Radial part of w: x <x, w> / (|x| + eps)^2, with the
    parameter before decay. Rows of zeros have cos = 0. Dimensions 0 and 1: Adam with decoupled
    decay. `nesterov`: (b1 m + (1 - b1) g) / (1 - b1^t) instead of m / (1 - b1^t). The learning
    rate is outside. timm's factory has wd_ratio 0.01 and nesterov True. The test is a jump: near
    the threshold two precisions may differ.
    """

    def setup(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
    ) -> None:
        super().setup(betas, eps)
        self.delta, self.wd_ratio, self.nesterov = delta, wd_ratio, nesterov

    def step(self, grad: Array, lr: float) -> None:
        self.t += 1
        g = np.asarray(grad, dtype=np.float64)
        correction1, correction2 = self.average(g)
        b1 = self.betas[0]
        m = b1 * self.m + (1 - b1) * g if self.nesterov else self.m
        u = m / correction1 / (np.sqrt(self.v / correction2) + self.eps)
        ratio = 1.0
        if g.ndim > 1:
            for rows in (len(g), 1):
                x, gradient = self.x.reshape(rows, -1), g.reshape(rows, -1)
                if self.orthogonal(gradient, x):
                    unit = x / (np.linalg.norm(x, axis=1, keepdims=True) + self.eps)
                    w = u.reshape(rows, -1)
                    radial = (unit * w).sum(axis=1, keepdims=True)
                    u = (w - unit * radial).reshape(g.shape)
                    ratio = self.wd_ratio
                    break
        self.x = self.x - lr * u - lr * self.weight_decay * ratio * self.x

    def orthogonal(self, g: Array, x: Array) -> bool:
        sizes = [np.maximum(np.linalg.norm(a, axis=1), self.eps) for a in (g, x)]
        cosine = np.abs((g * x).sum(axis=1)) / (sizes[0] * sizes[1])
        return bool(cosine.max() < self.delta / math.sqrt(x.shape[1]))


class Adan(Reference):
    """Xie et al. 2022 (arXiv:2208.06677), Algorithm 1, in the form of the authors' code.

    Defaults: lr 1e-3, weight_decay 0
    The betas are those of the code (sail-sg/Adan), one minus the paper's (0.02, 0.08, 0.01). Bias
    corrections as in the code, where the paper starts m and n from the first gradients. The first
    difference is zero. Decay is proximal: x <- (x - lr u) / (1 + lr wd). optax has the factor
    1 - b2 = 0.08 of the difference where paper and code have b2 = 0.92; lucidrains' adan-pytorch
    differs too. The learning rate is outside. Elementwise.
    """

    def setup(
        self, betas: tuple[float, float, float] = (0.98, 0.92, 0.99), eps: float = 1e-8
    ) -> None:
        self.betas, self.eps = betas, eps
        self.m, self.d, self.n = (np.zeros_like(self.x) for _ in range(3))
        self.previous = np.zeros_like(self.x)

    def step(self, grad: Array, lr: float) -> None:
        self.t += 1
        g = np.asarray(grad, dtype=np.float64)
        b1, b2, b3 = self.betas
        difference = g - self.previous if self.t > 1 else np.zeros_like(g)
        self.previous = g
        self.m = b1 * self.m + (1 - b1) * g
        self.d = b2 * self.d + (1 - b2) * difference
        self.n = b3 * self.n + (1 - b3) * (g + b2 * difference) ** 2
        m, d, n = self.m / (1 - b1**self.t), self.d / (1 - b2**self.t), self.n / (1 - b3**self.t)
        u = (m + b2 * d) / (np.sqrt(n) + self.eps)
        self.x = (self.x - lr * u) / (1 + lr * self.weight_decay)


class ADOPT(Reference):
    """Taniguchi et al. 2024 (arXiv:2411.02853), the revised algorithm: clipping c_t = t^(1/4).

    Defaults: lr 1e-3, weight_decay 0
    The first gradient is v and moves nothing, decay included. With t = 1 at the second step:
    m <- b1 m + (1 - b1) clip(g / max(sqrt(v), eps), -t^(1/4), t^(1/4));  x <- x - lr (m + wd x);
    then v <- b2 v + (1 - b2) g^2. No bias correction. Decoupled decay (`decouple` in the authors'
    code, iShohei220/adopt, where it is off by default). The first published version had no
    clipping, and m = g / max(sqrt(v), eps) at the first move; HeavyBall has no clipping, kozistr
    counts t from the first step and decays at it, timm has t^0.333. Elementwise.
    """

    def setup(self, betas: tuple[float, float] = (0.9, 0.9999), eps: float = 1e-6) -> None:
        self.betas, self.eps = betas, eps
        self.m = np.zeros_like(self.x)

    def direction(self, g: Array) -> Array | None:
        if self.t == 1:
            self.v = g**2
            return None
        b1, b2 = self.betas
        bound = (self.t - 1) ** 0.25
        scaled = np.clip(g / np.maximum(np.sqrt(self.v), self.eps), -bound, bound)
        self.m = b1 * self.m + (1 - b1) * scaled
        self.v = b2 * self.v + (1 - b2) * g**2
        return self.m


class AdEMAMix(AdamMoments):
    """Pagliardini et al. 2024 (arXiv:2409.03137), Algorithm 1: a second, slow average.

    Defaults: lr 1e-3, weight_decay 0
    u = (m / (1 - b1^t) + alpha_t slow) / (sqrt(v / (1 - b2^t)) + eps);  the slow average, with the
    third beta, has no bias correction. Schedules, with s = min(1, t / warmup) and t from 1:
    alpha_t = s alpha; beta3_t has the half-life (1 - s) L(b1) + s L(b3), L(b) = ln(1/2) / ln(b),
    which is the paper's exp(ln b1 ln b3 / ((1 - s) ln b3 + s ln b1)). None: constant. The
    paper's warm-ups are the whole training; alpha 2 is the default of the authors' code
    (apple/ml-ademamix), the EPFL benchmark has 8 for language models. The code adds 1e-8 to the
    betas in the logarithms; kozistr has one warm-up for both. Elementwise.
    """

    def setup(
        self,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: float = 1e-8,
        alpha: float = 2.0,
        alpha_warmup: int | None = None,
        beta3_warmup: int | None = None,
    ) -> None:
        super().setup(betas[:2], eps)
        self.beta3, self.alpha = betas[2], alpha
        self.alpha_warmup, self.beta3_warmup = alpha_warmup, beta3_warmup
        self.slow = np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        correction1, correction2 = self.average(g)
        b3, alpha = self.beta3, self.alpha
        if self.beta3_warmup is not None:
            s = min(1.0, self.t / self.beta3_warmup)
            b3 = 0.5 ** (1 / ((1 - s) * half_life(self.betas[0]) + s * half_life(b3)))
        if self.alpha_warmup is not None:
            alpha = min(1.0, self.t / self.alpha_warmup) * alpha
        self.slow = b3 * self.slow + (1 - b3) * g
        denominator = np.sqrt(self.v / correction2) + self.eps
        return (self.m / correction1 + alpha * self.slow) / denominator


def half_life(beta: float) -> float:
    """Return after how many steps an average has forgotten half of a gradient."""
    return math.log(0.5) / math.log(beta) if beta > 0 else 0.0


class LAMB(AdamMoments):
    """You et al. 2020 (arXiv:1904.00962), Algorithm 2, with phi(z) = z.

    Defaults: lr 1e-3, weight_decay 0.01
    u = m_hat / (sqrt(v_hat) + eps) + wd x, bias corrections inside;  x <- x - lr |x| / |u| u, over
    the whole tensor. The ratio is 1 where |x| or |u| is 0 (authors' code), and, paper silent, for
    dimensions 0 and 1: the authors' BERT runs exclude biases and gains from the ratio (as from
    decay), else biases that start from 0 could hardly move. torch_optimizer (debias=True),
    bitsandbytes and kozistr have bias corrections outside of the ratio or none; kozistr and the
    EPFL benchmark limit |x| to 10; timm has the ratio only where wd > 0 and clips the global norm
    of the gradient to 1; torch_optimizer, kozistr and optax give vectors a ratio.
    """

    def setup(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6) -> None:
        super().setup(betas, eps)

    def step(self, grad: Array, lr: float) -> None:
        self.t += 1
        correction1, correction2 = self.average(np.asarray(grad, dtype=np.float64))
        r = self.m / correction1 / (np.sqrt(self.v / correction2) + self.eps)
        u = r + self.weight_decay * self.x
        size, length = np.linalg.norm(self.x), np.linalg.norm(u)
        ratio = size / length if self.x.ndim >= 2 and size > 0 and length > 0 else 1.0
        self.x = self.x - lr * ratio * u


class NovoGrad(Reference):
    """Ginsburg et al. 2019 (arXiv:1905.11286), Algorithm 1.

    Defaults: lr 1e-3, weight_decay 0
    v is a number per tensor: v <- b2 v + (1 - b2) |g|^2, and |g|^2 at the first step;
    m <- b1 m + (g / (sqrt(v) + eps) + wd x);  x <- x - lr m. Decay is inside of the momentum, the
    learning rate outside, no bias corrections; m isn't an average, so a steady step is
    1 / (1 - b1) = 20 times lr (`grad_averaging` of NVIDIA's code, off by default, would multiply
    by 1 - b1). All dimensions alike. timm's NvNovoGrad, torch_optimizer and kozistr agree.
    """

    def setup(self, betas: tuple[float, float] = (0.95, 0.98), eps: float = 1e-8) -> None:
        self.betas, self.eps = betas, eps
        self.m, self.v = np.zeros_like(self.x), 0.0

    def step(self, grad: Array, lr: float) -> None:
        self.t += 1
        g = np.asarray(grad, dtype=np.float64)
        b1, b2 = self.betas
        square = float((g**2).sum())
        self.v = b2 * self.v + (1 - b2) * square if self.t > 1 else square
        self.m = b1 * self.m + g / (math.sqrt(self.v) + self.eps) + self.weight_decay * self.x
        self.x = self.x - lr * self.m


class EXAdam(AdamMoments):
    """Adly 2024 (arXiv:2412.20302v2), Algorithm 1, as the author's AhmedMostafa16/EXAdam.

    Defaults: lr 1e-3, weight_decay 0
    d1 = 1 + b2^t v / (v + eps), d2 = 1 + b1^t m^2 / (m^2 + eps);
    u = d1 (m + g) / (1 - b1^t) / (sqrt(d2 v / (1 - b2^t)) + eps). The gradient beside m is whole:
    a steady step is 2 lr. Version 1 of the paper also had a learning rate that grows with time,
    gone from version 2 and the code. Decoupled decay, from the code. Elementwise.
    """

    def setup(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().setup(betas, eps)

    def direction(self, g: Array) -> Array:
        correction1, correction2 = self.average(g)
        b1, b2 = (b**self.t for b in self.betas)
        d1 = 1 + b2 * self.v / (self.v + self.eps)
        d2 = 1 + b1 * self.m**2 / (self.m**2 + self.eps)
        denominator = np.sqrt(d2 * self.v / correction2) + self.eps
        return d1 * (self.m + g) / correction1 / denominator


class ScaledAdam(AdamMoments):
    """Yao et al. 2023 (Zipformer, arXiv:2310.11230v4), equations 6 and 7, Algorithm 1.

    Defaults: lr 0.045, weight_decay 0
    With a = sqrt(1 - b2^t) / (1 - b1^t) and r = RMS(x) before the step, a number per tensor:
    u = r a m / (sqrt(v) + eps) + scale_lr a n / (sqrt(w) + eps) x, where n and w are the moments of
    the number h = sum(g x), the gradient by the logarithm of the scale. Algorithm 1 has eps under
    the root, the equations and the authors' code (k2-fsa/icefall) outside. The rate is outside.

    Paper silent, from the code: r is at least `min_rms`, or zeros would stay zeros; the scale
    isn't learned where RMS(x) < min_rms, and shrinks at the full rate (the second fraction is 1)
    where RMS(x) > max_rms; tensors of one element have no scale: u = scale_lr a m / (sqrt(v) + eps)
    (the code also limits them to +-10). There is no decay in paper and code; ours is decoupled.

    Otherwise the code is another algorithm, for speed: momentum over steps that have lr and r in
    them, without bias correction 1, n and r renewed at every 4th step, and clipping by the
    median of the last norms of all gradients. Later versions have min_rms 0.005 for matrices and
    max_rms 1, and growth that stops at max_rms.
    """

    def setup(
        self,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        scale_lr: float = 0.1,
        min_rms: float = 1e-5,
        max_rms: float = 3.0,
    ) -> None:
        super().setup(betas, eps)
        self.eta, self.min_rms, self.max_rms = scale_lr, min_rms, max_rms
        self.n = self.w = 0.0

    def direction(self, g: Array) -> Array:
        b1, b2 = self.betas
        correction1, correction2 = self.average(g)
        a = math.sqrt(correction2) / correction1
        adam = a * self.m / (np.sqrt(self.v) + self.eps)
        if self.x.size == 1:
            return self.eta * adam
        h = float(np.vdot(g, self.x))
        self.n = b1 * self.n + (1 - b1) * h
        self.w = b2 * self.w + (1 - b2) * h**2
        growth = a * self.n / (math.sqrt(self.w) + self.eps)
        r = math.sqrt(float(np.mean(self.x**2)))
        if r < self.min_rms:
            growth = 0.0
        elif r > self.max_rms:
            growth = 1.0
        return max(r, self.min_rms) * adam + self.eta * growth * self.x


class StableSPAM(AdamMoments):
    """Huang et al. 2025 (arXiv:2502.17055v2): AdaClip, AdaGN, momentum reset, then AdamW.

    Defaults: lr 1e-3, weight_decay 0
    Per tensor, with gammas (norm, squared norm, largest element; the paper's gamma 1, 2, 3) and t
    counting all steps:
    AdaClip: top <- c3 top + (1 - c3) max|g|, limit = top / (1 - c3^t); elements beyond the limit
    are multiplied by limit / max|g|.
    AdaGN, k = |g| after that: p <- c1 p + (1 - c1) k, q <- c2 q + (1 - c2) k^2;
    g <- g / k  (p / (1 - c1^t)) / (sqrt(q / (1 - c2^t)) + eps), where k > 0.
    Reset: before a step t that `reset_interval` divides, m = v = 0, and the bias corrections of m
    and v count from 1 again (0: never). Then Adam. Decoupled decay. All dimensions alike.

    The counts are the intent of the authors' code (TianjinYellow/StableSPAM, read in two of its
    forks), and what kozistr has. In the code itself the step of a reset still uses the old moments
    and throws its gradient away, and the corrections by gammas restart too, which multiplies the
    limit by 500 after a reset: taken for mistakes. Left out: its optional cosine of b1 and gamma 1
    (`total_T`). AdaClip jumps: two precisions may differ at its limit.
    """

    def setup(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        gammas: tuple[float, float, float] = (0.7, 0.9, 0.999),
        eps: float = 1e-8,
        reset_interval: int = 1000,
    ) -> None:
        super().setup(betas, eps)
        self.gammas, self.interval = gammas, reset_interval
        self.norm = self.square = self.top = 0.0
        self.since_reset = 0

    def direction(self, g: Array) -> Array:
        g = self.stabilised(g)
        if self.interval and self.t % self.interval == 0:
            self.m, self.v = np.zeros_like(g), np.zeros_like(g)
            self.since_reset = 0
        self.since_reset += 1
        self.average(g)
        correction1, correction2 = (1 - b**self.since_reset for b in self.betas)
        return self.m / correction1 / (np.sqrt(self.v / correction2) + self.eps)

    def stabilised(self, g: Array) -> Array:
        c1, c2, c3 = self.gammas
        largest = float(np.abs(g).max())
        self.top = c3 * self.top + (1 - c3) * largest
        limit = self.top / (1 - c3**self.t)
        if largest > limit:
            g = np.where(np.abs(g) > limit, g * (limit / largest), g)
        norm = float(np.linalg.norm(g))
        self.norm = c1 * self.norm + (1 - c1) * norm
        self.square = c2 * self.square + (1 - c2) * norm**2
        mean, square = self.norm / (1 - c1**self.t), self.square / (1 - c2**self.t)
        return g / norm * (mean / (math.sqrt(square) + self.eps)) if norm > 0 else g


REFERENCES: dict[str, type] = {
    "adamp": AdamP,
    "adan": Adan,
    "adopt": ADOPT,
    "ademamix": AdEMAMix,
    "lamb": LAMB,
    "novograd": NovoGrad,
    "exadam": EXAdam,
    "scaled_adam": ScaledAdam,
    "stable_spam": StableSPAM,
}
