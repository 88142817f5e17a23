"""Wrappers: changes to the direction of any rule, before lr and decay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from steepest.optim.live import Hyper
from steepest.optim.rule import State, Wrapper


@dataclass(frozen=True)
class Cautious(Wrapper):
    """Cautious updates (Liang et al., 2024, arXiv:2411.16085, Algorithm 1).

    mask = 1 where u g > 0, else 0;  u <- u mask / (mean(mask) + 1 / size)

    The gradient is the raw one; decay is outside the mask. `1 / size` is the paper's +1 in
    size / (sum(mask) + 1), which keeps the scale finite where no sign agrees.
    """

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the inner direction without the elements that oppose the gradient."""
        direction, new = self.inner.update(grad, param, state, h)
        mask = (direction * grad > 0).to(direction.dtype)
        return direction * mask * (mask.numel() / (mask.sum() + 1)), new
