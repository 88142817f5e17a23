"""Methods with estimates of the curvature from a second gradient, from their papers."""

from __future__ import annotations

import numpy as np

from references.base import Array, SignMethod


class SophiaG(SignMethod):
    """Liu et al. 2023 (arXiv 2305.14342), Algorithm 3, with Gauss-Newton-Bartlett (Algorithm 2).

    m <- b1 m + (1 - b1) g, no bias correction;  x -= lr (clip(m / max(rho h, eps), 1) + wd x).
    At the steps t with t mod k = 1, k being `update_interval` (`wants(t)`), before the step and at
    the same weights, h <- b2 h + (1 - b2) B s^2 (`observe(s, B)`), h = 0 before the first: s is
    the gradient of the mean loss on labels drawn from the model's own softmax, over all
    microbatches, and B the number of tokens it is the mean over. s is not clipped.

    gamma and rho: the paper's clip(m / max(gamma h, eps), 1) has the factor B in h. The authors'
    code averages s^2 alone and divides by rho bs h + 1e-15, where bs = sequences * length is the
    number of tokens in a batch. So rho bs h_code = rho h, and rho IS gamma, as long as the batch
    does not change. With B in h a changed batch is right, so we keep the paper's form, and the
    code's name and 0.04 (its configs for GPT-2 have 0.03 to 0.05). Where h is 0 the step is a
    sign, in both. Early code clipped m / h to a threshold c: that is c clip(m / (c h), 1).

    Different: the code estimates after step k, 2k, ..., at the weights and on the batch after it:
    before steps k+1, 2k+1, ... as here, but not before step 1, so its first k steps are signs. It
    clips s to norm 1, and its `bs` is 5120 unless given, whatever the batch. Ports that use the
    training gradient for s are another method (optax before #979); scaling-for-scaling's never
    estimates and is Signum; llm-optimizer-benchmark's uses one microbatch and a fixed bs; kozistr's
    SophiaH is Hutchinson's estimate.

    `margin` also counts what the preconditioner forgives: max(|m|, rho h, eps) relative to the
    size of m.

    Defaults: lr 1e-4, weight_decay 0.1
    """

    def setup(
        self,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        eps: float = 1e-12,
        update_interval: int = 10,
    ) -> None:
        super().setup()
        self.betas, self.rho, self.eps, self.interval = betas, rho, eps, update_interval
        self.h = np.zeros_like(self.x)

    def wants(self, t: int) -> bool:
        """Say whether an estimate comes before step t, counted from 1."""
        return (t - 1) % self.interval == 0

    def observe(self, sampled_label_grad: Array, tokens: int) -> None:
        """Take the gradient of the mean loss over `tokens` labels drawn from the model."""
        s = np.asarray(sampled_label_grad, dtype=np.float64)
        b2 = self.betas[1]
        self.h = b2 * self.h + (1 - b2) * tokens * s**2

    def direction(self, g: Array) -> Array:
        b1 = self.betas[0]
        self.m = b1 * self.m + (1 - b1) * g
        self.size = b1 * self.size + (1 - b1) * np.abs(g)
        scale = np.maximum(self.rho * self.h, self.eps)
        self.sign(np.maximum(np.abs(self.m), scale), self.size)  # Only for `margin`.
        return np.clip(self.m / scale, -1, 1)


REFERENCES: dict[str, type] = {"sophia_g": SophiaG}
