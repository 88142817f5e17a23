"""Methods with little state, from their papers."""

from __future__ import annotations

import numpy as np

from references.adam import AdamW
from references.base import Array, Reference
from references.sgd_sign import Lion


class Adafactor(Reference):
    """Shazeer & Stern, Algorithms 4 (matrices) and 5 (vectors) with rho_t = lr and no alpha_t.

    Sums as in the paper, where implementations keep means: R C / (1^T R) is the same. More than
    two dimensions: a matrix per leading index, as in the authors' mesh_tensorflow.
    The first moment is of the clipped update, before lr (torch-style; transformers and
    pytorch_optimizer have lr inside it: the same at a constant rate only).
    """

    def setup(
        self,
        beta1: float | None = None,
        decay_rate: float = 0.8,
        clip_threshold: float = 1.0,
        eps: float = 1e-30,
    ) -> None:
        self.beta1, self.decay_rate, self.d, self.eps = beta1, decay_rate, clip_threshold, eps
        self.r = self.c = self.v = 0.0
        self.m = np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        b2 = 1 - self.t ** (-self.decay_rate)
        squared = g**2 + self.eps
        if g.ndim >= 2:
            self.r = b2 * self.r + (1 - b2) * squared.sum(-1)
            self.c = b2 * self.c + (1 - b2) * squared.sum(-2)
            total = self.r.sum(-1)[..., None, None]
            v = self.r[..., :, None] * self.c[..., None, :] / total
        else:
            self.v = b2 * self.v + (1 - b2) * squared
            v = self.v
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt(np.mean(u**2)) / self.d)
        if self.beta1 is None:
            return u
        self.m = self.beta1 * self.m + (1 - self.beta1) * u
        return self.m


class CAME(Reference):
    """Luo et al. 2023 (arXiv 2307.02047), Algorithm 2: Adafactor's u, slowed by its instability.

    u = g / sqrt(v) with v factored and b2 constant, clipped: u / max(1, RMS(u) / clip_threshold);
    m <- b1 m + (1 - b1) u;  (u - m)^2 + eps2, with the new m, is averaged with b3 and factored
    like v into S;  x -= lr m / sqrt(S). No bias corrections: with the default betas the first
    u is clipped from 32 to 1 and m / sqrt(S) is about 11 times it. The paper's eps_1 and eps_2 are
    `eps` and `eps2`. The learning rate is outside m; decay is decoupled, as in the authors' code.

    Vectors and scalars (on which the paper is silent) as in the authors' code: v is not factored,
    and x -= lr m without S. More than two dimensions: a matrix per leading index, like Adafactor
    here and the authors' code; RMS is of the whole tensor.

    Different: scaling-for-scaling's scripts run it with eps2 1e-6. In float32 R / (1^T R) must be
    formed before it multiplies C: a product of two eps is zero.

    Defaults: lr 2e-4, weight_decay 1e-2
    """

    def setup(
        self,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: float = 1e-30,
        eps2: float = 1e-16,
        clip_threshold: float = 1.0,
    ) -> None:
        self.betas, self.eps, self.eps2, self.d = betas, eps, eps2, clip_threshold
        self.r = self.c = self.v = self.r_res = self.c_res = 0.0
        self.m = np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        b1, b2, b3 = self.betas
        squared = g**2 + self.eps
        if g.ndim >= 2:
            self.r = b2 * self.r + (1 - b2) * squared.sum(-1)
            self.c = b2 * self.c + (1 - b2) * squared.sum(-2)
            v = outer(self.r, self.c)
        else:
            v = self.v = b2 * self.v + (1 - b2) * squared
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt(np.mean(u**2)) / self.d)
        self.m = b1 * self.m + (1 - b1) * u
        if g.ndim < 2:
            return self.m
        instability = (u - self.m) ** 2 + self.eps2
        self.r_res = b3 * self.r_res + (1 - b3) * instability.sum(-1)
        self.c_res = b3 * self.c_res + (1 - b3) * instability.sum(-2)
        return self.m / np.sqrt(outer(self.r_res, self.c_res))


def outer(r: Array, c: Array) -> Array:
    """Return r c^T / (1^T r), for each leading index."""
    return r[..., :, None] * c[..., None, :] / r.sum(-1)[..., None, None]


class AdamMini(Reference):
    """Zhang et al. 2024 (arXiv 2406.16793), Algorithm 1: AdamW with one v per block.

    v_b <- b2 v_b + (1 - b2) mean over the block of g^2;  m, bias corrections, eps and decoupled
    decay are AdamW's. `blocks` cuts the rows (the first dimension) into so many equal blocks,
    each a contiguous piece of the tensor: rows -> one v per output row (or token), heads -> one
    per head, 1 -> one for the tensor; 0 stands for the rows of a matrix and for 1 of a vector. A
    vector of n elements with n blocks is AdamW (the authors' biases). Which parameter gets which
    is the router's; the spec file has the paper's.

    Different: adam-mini 1.1.1 chooses blocks by name and has no decay where the name contains
    norm, ln or bias; kozistr has an older partition (elementwise embedding and head).

    Defaults: lr 1e-3, weight_decay 0
    """

    def setup(
        self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, blocks: int = 0
    ) -> None:
        rows = self.x.shape[0] if self.x.ndim else 1
        blocks = blocks or (rows if self.x.ndim >= 2 else 1)
        assert rows % blocks == 0, f"{rows} rows can't be cut into {blocks} equal blocks"
        self.betas, self.eps, self.blocks = betas, eps, blocks
        self.m, self.v = np.zeros_like(self.x), np.zeros((blocks, 1))

    def direction(self, g: Array) -> Array:
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        cut = g.reshape(self.blocks, -1)
        self.v = b2 * self.v + (1 - b2) * np.mean(cut**2, axis=1, keepdims=True)
        m_hat = self.m.reshape(cut.shape) / (1 - b1**self.t)
        u = m_hat / (np.sqrt(self.v / (1 - b2**self.t)) + self.eps)
        return u.reshape(g.shape)


MIN_QUANTISED = 4096
"""Tensors with fewer elements keep full states."""


def dynamic_codes(*, signed: bool) -> Array:
    """Return the 256 values of 8-bit dynamic (tree) quantisation, ascending, in [-1, 1].

    Decade i = 0..6, from 10^(i - 7) to 10^(i - 6), is cut into n equal intervals, whose centres
    are codes: n = 2^i for each sign, or 2^(i + 1) without signs. 254 of them, and 0, and 1 (but
    not -1). So the top decade has 64 intervals for each sign or 128, and the lowest 1 or 2. They
    are float32 numbers, the nearest to these (bitsandbytes', rounded on the way, are within two
    units in the last place).
    """
    codes = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, (2**i if signed else 2 ** (i + 1)) + 1)
        centres = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        codes += [*centres, *(-centres if signed else [])]
    return np.sort(np.array(codes)).astype(np.float32).astype(np.float64)


class EightBit:
    """What 8 bits a value keep of a state: Dettmers et al. 2022 (arXiv 2110.02861).

    After each step a state is replaced by what 8 bits can hold of it. The flattened tensor is cut
    into blocks of `block_size` (the last may be shorter). A block keeps its absmax a, and for each
    element the code nearest to value / a; on the border between two codes, the lower one. A block
    of zeros has a = 0 and stays zero. The step itself uses the new state before it is rounded.
    The codes and a are the storage: float32 numbers, in whatever precision the step is taken.
    """

    def __init__(self, block_size: int, *, signed: bool) -> None:
        self.block_size, self.codes = block_size, dynamic_codes(signed=signed)
        self.borders = (self.codes[:-1] + self.codes[1:]) / 2

    def __call__(self, values: Array) -> tuple[Array, Array]:
        """Return what is read back, and each value's distance from where its code changes."""
        flat = values.ravel()
        kept, distance = np.zeros_like(flat), np.full_like(flat, np.inf)
        for start in range(0, flat.size, self.block_size):
            block = slice(start, start + self.block_size)
            a = float(np.float32(np.abs(flat[block]).max()))
            if a == 0:
                continue
            code = np.searchsorted(self.borders, flat[block] / a, side="left")
            kept[block] = a * self.codes[code]
            around = np.clip([code - 1, code], 0, len(self.borders) - 1)
            distance[block] = np.abs(flat[block] - a * self.borders[around]).min(axis=0)
        return kept.reshape(values.shape), distance.reshape(values.shape)


class Quantised:
    """Mixin of a Reference with 8-bit states.

    `margin` is, per element, the smallest distance so far of a state from the border between two
    codes, over the sum of the absolute values the state was added up from. Near float32's
    rounding error (3e-7 is enough) float32 may choose the neighbouring code, and that element's
    trajectory then differs by a whole code; others only if it becomes its block's absmax.
    """

    margin: Array

    def stored(self, state: Array, size: Array, eight_bit: EightBit) -> Array:
        """Return what is left of a state that was added up from terms whose sizes add to `size`."""
        if state.size < MIN_QUANTISED:
            return state
        kept, distance = eight_bit(state)
        exact = size == 0
        margin = np.where(exact, np.inf, distance / np.where(exact, 1.0, size))
        self.margin = np.minimum(self.margin, margin)
        return kept


class Adam8bit(Quantised, AdamW):
    """AdamW with 8-bit m (signed codes) and v (unsigned): see EightBit.

    Decay is decoupled; so it is in bitsandbytes, whose Adam8bit and AdamW8bit differ in the
    default decay only (0, 1e-2). The paper has blocks of 2048; 256 is bitsandbytes' since 0.44.

    A v below 1.6e-7 of its block's greatest is stored as zero, m only below 2.8e-7: where then g
    is exactly zero the step is m / eps, as in rare tokens' rows. Embeddings are better left with
    full states, which is the router's business (bitsandbytes: GlobalOptimManager).

    Different: bitsandbytes on CUDA gives a negative m that would round to zero the smallest
    negative code (so m keeps its sign), decays after the move, and skips elements whose gradient
    is not finite. On CPU (0.50.2) it does none of that, but its compiled search resolves no more
    than about 2e-5 of a: smaller v become 1.6e-5 a, smaller m +-2.1e-5 a. torchao quantises only
    tensors whose size is a multiple of the block size.

    Defaults: lr 1e-3, weight_decay 1e-2
    """

    def setup(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        amsgrad: bool = False,
        block_size: int = 256,
    ) -> None:
        super().setup(betas=betas, eps=eps, amsgrad=amsgrad)
        self.signed = EightBit(block_size, signed=True)
        self.unsigned = EightBit(block_size, signed=False)
        self.margin = np.full_like(self.x, np.inf)

    def direction(self, g: Array) -> Array:
        b1 = self.betas[0]
        size = b1 * np.abs(self.m) + (1 - b1) * np.abs(g)
        u = super().direction(g)
        self.m = self.stored(self.m, size, self.signed)
        self.v = self.stored(self.v, self.v, self.unsigned)
        if self.amsgrad:
            self.v_max = self.stored(self.v_max, self.v_max, self.unsigned)
        return u


class Lion8bit(Quantised, Lion):
    """Lion with an 8-bit m (signed codes): see EightBit. `margin` also has the signs' margins.

    Different: as Adam8bit; and bitsandbytes had coupled decay, inside the sign, until 2026.

    Defaults: lr 1e-4, weight_decay 0
    """

    def setup(self, betas: tuple[float, float] = (0.9, 0.99), block_size: int = 256) -> None:
        super().setup(betas=betas)
        self.signed = EightBit(block_size, signed=True)

    def direction(self, g: Array) -> Array:
        b2 = self.betas[1]
        size = b2 * np.abs(self.m) + (1 - b2) * np.abs(g)
        u = super().direction(g)
        if self.m.size >= MIN_QUANTISED:
            self.m = self.stored(self.m, size, self.signed)
            self.size = np.abs(self.m)  # A stored m is exact.
        return u


REFERENCES: dict[str, type] = {
    "adafactor": Adafactor,
    "came": CAME,
    "adam_mini": AdamMini,
    "adam8bit": Adam8bit,
    "lion8bit": Lion8bit,
}
