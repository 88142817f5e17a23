"""Variants of Adam by tensor: norms of whole gradients and weights shape the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.optim.live import Hyper
from steepest.optim.recipe import Recipe
from steepest.optim.rule import State, compute_dtype, ema
from steepest.optim.rules.adam import DecayInside, TwoMoments


@dataclass(frozen=True)
class AdamP(TwoMoments):
    """AdamP, Adam without growth of scale-invariant weights (Heo et al., 2021, arXiv:2006.08217,
    Algorithm 2, with the test of the authors' code).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), b1 m + (1 - b1) g in place of m with nesterov
    if max |cos(g, w)| < delta / sqrt(length of w):  u <- u - w (w . u) / (|w| + eps)^2, decay times
    wd_ratio

    The test is first of all rows together, w being a row, and if that fails of the whole tensor,
    w being all of it. A row is what the first dimension counts. Vectors get plain AdamW. The test
    is a jump: near it a rounding can change a step.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    delta: float = 0.1
    wd_ratio: float = 0.1
    nesterov: bool = False

    elementwise: ClassVar[bool] = False

    def init(self, param: Tensor) -> State:
        """Return both moments, zero, and the factor of the weight decay."""
        return {**super().init(param), "decay": param.new_ones(())}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return Adam's direction, where the test passes without its part along the weights."""
        m, v = self.moments(grad, state, h)
        ahead = ema(m, grad, h.betas[0]) if self.nesterov else m
        u = h.scale1 * ahead / (h.root_scale2 * v.sqrt() + h.eps)
        new = {"exp_avg": m, "exp_avg_sq": v}
        if grad.ndim < 2:
            return u, new
        rows_pass, by_rows = _tangential(u, grad, param, len(grad), h)
        passes, whole = _tangential(u, grad, param, 1, h)
        u = torch.where(rows_pass, by_rows, torch.where(passes, whole, u))
        return u, {**new, "decay": torch.where(rows_pass | passes, h.wd_ratio, 1.0)}

    def move(
        self, param: Tensor, direction: Tensor, state: State, h: Hyper
    ) -> tuple[Tensor, State]:
        """Return the parameter after a step, decayed as the test said."""
        p = param.to(compute_dtype(param.dtype))
        return p - h.lr * (direction + h.weight_decay * state["decay"] * p), {}


def _tangential(
    u: Tensor, grad: Tensor, param: Tensor, rows: int, h: Hyper
) -> tuple[Tensor, Tensor]:
    """Return whether all rows of the gradient are nearly orthogonal to those of the weights, and
    u without its part along the latter."""
    g, w, flat = (t.reshape(rows, -1) for t in (grad, param, u))
    g_size, w_size = (t.norm(dim=1, keepdim=True) for t in (g, w))
    cosine = (g / g_size.clamp(min=h.eps) * (w / w_size.clamp(min=h.eps))).sum(1)
    unit = w / (w_size + h.eps)
    along = (unit * flat).sum(1, keepdim=True)
    passes = cosine.abs().max() < h.delta / w.shape[1] ** 0.5
    return passes, (flat - unit * along).view_as(u)


@dataclass(frozen=True)
class LAMB(DecayInside, TwoMoments):
    """LAMB, Adam with steps as long as the weights (You et al., 2020, arXiv:1904.00962, Alg. 2).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    d = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd w
    u = d |w| / |d|, norms over the whole tensor

    u = d where either norm is 0, and for vectors, as in the authors' BERT runs. Decay is part of d,
    so of matrices it changes the direction and not the length of a step.
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6

    elementwise: ClassVar[bool] = False

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the direction of Adam and decay, of matrices at the length of the weights."""
        m, v = self.moments(grad, state, h)
        d = h.scale1 * m / (h.root_scale2 * v.sqrt() + h.eps) + h.weight_decay * param
        new = {"exp_avg": m, "exp_avg_sq": v}
        if grad.ndim < 2:
            return d, new
        size, length = param.norm(), d.norm()
        return torch.where((size == 0) | (length == 0), 1.0, size / length) * d, new


@dataclass(frozen=True)
class NovoGrad(DecayInside):
    """NovoGrad, one second moment per tensor (Ginsburg et al., 2019, arXiv:1905.11286, Alg. 1).

    v <- b2 v + (1 - b2) |g|^2, and |g|^2 at the first step
    m <- b1 m + g / (sqrt(v) + eps) + wd w;  u = m

    m is a sum, not an average: where gradients do not change, a step is 1 / (1 - b1) = 20 times
    that of one gradient. Decay passes through it. No bias corrections.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.95, 0.98)
    eps: float = 1e-8

    def init(self, param: Tensor) -> State:
        """Return the momentum and the mean square norm, zero."""
        return {"exp_avg": torch.zeros_like(param), "norm_sq": param.new_zeros(())}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the decay of the norm's average, 0 at the first step."""
        return {"beta2_now": values["betas"][1] if step > 1 else 0.0}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the sum of normalised gradients and decay."""
        v = ema(state["norm_sq"], (grad * grad).sum(), h.beta2_now)
        m = h.betas[0] * state["exp_avg"] + grad / (v.sqrt() + h.eps) + h.weight_decay * param
        return m, {"exp_avg": m, "norm_sq": v}


@dataclass(frozen=True)
class ScaledAdam(TwoMoments):
    """ScaledAdam, Adam at the weights' scale, which is learned too (Yao et al., 2023, Zipformer,
    arXiv:2310.11230v4, equations 6 and 7).

    a = sqrt(1 - b2^t) / (1 - b1^t);  r = root mean square of w;  k = sum(g w)
    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2, and n, s the same of k
    u = max(r, min_rms) a m / (sqrt(v) + eps) + scale_lr q w,  q = a n / (sqrt(s) + eps)

    q is 0 where r < min_rms, and 1 where r > max_rms; a tensor of one element has
    u = scale_lr a m / (sqrt(v) + eps). Those three are the authors' code's. Decay, decoupled, is
    neither's.
    """

    lr: float = 0.045
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    scale_lr: float = 0.1
    min_rms: float = 1e-5
    max_rms: float = 3.0

    elementwise: ClassVar[bool] = False

    def init(self, param: Tensor) -> State:
        """Return both moments of the gradient and of the gradient of the scale, zero."""
        names = ("scale_exp_avg", "scale_exp_avg_sq")
        return super().init(param) | {name: param.new_zeros(()) for name in names}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return both bias corrections in one, as eps is not corrected."""
        b1, b2 = values["betas"]
        return {"scale": (1 - b2**step) ** 0.5 / (1 - b1**step)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return Adam's direction at the size of the weights, and that of their scale."""
        m, v = self.moments(grad, state, h)
        adam = h.scale * m / (v.sqrt() + h.eps)
        new = {"exp_avg": m, "exp_avg_sq": v}
        if grad.numel() == 1:
            return h.scale_lr * adam, new
        b1, b2 = h.betas
        slope = (grad * param).sum()
        n = ema(state["scale_exp_avg"], slope, b1)
        s = ema(state["scale_exp_avg_sq"], slope * slope, b2)
        r = (param * param).mean().sqrt()
        q = torch.where(r > h.max_rms, 1.0, h.scale * n / (s.sqrt() + h.eps))
        q = torch.where(r < h.min_rms, 0.0, q)
        u = r.clamp(min=h.min_rms) * adam + h.scale_lr * q * param
        return u, {**new, "scale_exp_avg": n, "scale_exp_avg_sq": s}


@dataclass(frozen=True)
class StableSPAM(TwoMoments):
    """Stable-SPAM, Adam with clipped and normalised gradients (Huang et al., 2025,
    arXiv:2502.17055v2).

    top <- c3 top + (1 - c3) max|g|;  l = top / (1 - c3^t);  where |g| > l: g <- g l / max|g|
    k = |g|;  p <- c1 p + (1 - c1) k;  q <- c2 q + (1 - c2) k^2
    g <- g / k  p / (1 - c1^t) / (sqrt(q / (1 - c2^t)) + eps)
    u = Adam's direction of that g, from moments that start anew every `reset_interval` steps

    c are the gammas, all norms those of a whole tensor. The moments, and their bias corrections,
    start anew with the step whose number `reset_interval` divides; 0 is never. The clip is a jump:
    near it a rounding can change a step.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    gammas: tuple[float, float, float] = (0.7, 0.9, 0.999)
    eps: float = 1e-8
    reset_interval: int = 1000

    elementwise: ClassVar[bool] = False

    def init(self, param: Tensor) -> State:
        """Return both moments, and the averages of norm, squared norm and largest element, zero."""
        names = ("norm_avg", "norm_sq_avg", "max_avg")
        return super().init(param) | {name: param.new_zeros(()) for name in names}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return all bias corrections, and what is kept of the moments: 0 at a reset, else 1."""
        since, interval = step, self.reset_interval
        if interval and step >= interval:
            since = 1 + step % interval
        norm, norm_sq, largest = (1 / (1 - c**step) for c in values["gammas"])
        return {
            **super().scalars(since, values),
            "kept": float(step == 1 or since > 1),
            "norm_scale": norm,
            "norm_sq_scale": norm_sq,
            "max_scale": largest,
        }

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return Adam's direction of the stabilised gradient."""
        g, new = self._stabilised(grad, state, h)
        held = {name: h.kept * state[name] for name in ("exp_avg", "exp_avg_sq")}
        m, v = self.moments(g, held, h)
        u = h.scale1 * m / (h.root_scale2 * v.sqrt() + h.eps)
        return u, {**new, "exp_avg": m, "exp_avg_sq": v}

    def _stabilised(self, grad: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the gradient clipped and then normalised, and the three averages."""
        c1, c2, c3 = h.gammas
        largest = grad.abs().max()
        top = ema(state["max_avg"], largest, c3)
        limit = h.max_scale * top
        g = torch.where(grad.abs() > limit, grad / largest * limit, grad)
        k = g.norm()
        p, q = ema(state["norm_avg"], k, c1), ema(state["norm_sq_avg"], k * k, c2)
        size = h.norm_scale * p / ((h.norm_sq_scale * q).sqrt() + h.eps)
        g = torch.where(k == 0, g, g / k * size)
        return g, {"norm_avg": p, "norm_sq_avg": q, "max_avg": top}


RECIPES = (
    Recipe(
        "adamp",
        AdamP(),
        family="Adam",
        year=2021,
        paper="Heo et al., arXiv:2006.08217",
        state="8 * m * n + 4",
        differs=("timm makes it with wd_ratio 0.01 and nesterov by default.",),
    ),
    Recipe(
        "lamb",
        LAMB(),
        family="Adam",
        year=2020,
        paper="You et al., arXiv:1904.00962",
        state="8 * m * n",
        differs=(
            "pytorch-optimizer, bitsandbytes and torch_optimizer have the bias corrections outside "
            "of the ratio, or none; the first also limits |w| to 10.",
            "timm has no ratio without weight decay, and clips the norm of all gradients to 1.",
            "The BERT and ALBERT code has no bias corrections, and never decays what has no ratio.",
            "The Scaling for Scaling benchmark runs Adam, without a ratio, under this name.",
        ),
    ),
    Recipe(
        "novograd",
        NovoGrad(),
        family="Adam",
        year=2019,
        paper="Ginsburg et al., arXiv:1905.11286",
        state="4 * m * n + 4",
    ),
    Recipe(
        "scaled_adam",
        ScaledAdam(),
        family="Adam",
        year=2023,
        paper="Yao et al., arXiv:2310.11230",
        state="8 * m * n + 8",
        differs=(
            "The authors' code (k2-fsa/icefall, PyPI zipformer) has lr and r inside of the "
            "momentum, no first bias correction, a scale that moves every 4 steps, and clipping "
            "by the median norm of recent gradients; it limits tensors of one element to 10.",
        ),
    ),
    Recipe(
        "stable_spam",
        StableSPAM(),
        family="light state",
        year=2025,
        paper="Huang et al., arXiv:2502.17055",
        state="8 * m * n + 12",
        differs=(
            "In the authors' code the step of a reset still uses the old moments and drops its "
            "gradient, and the corrections by gammas start anew, too.",
        ),
    ),
)
