"""Gradients that are state: what a step leaves in them is added to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from steepest.optim.pieces import unsharded


class KeptGradients:
    """What steps left in the gradients of some parameters, whether or not it is still there.

    A loop that never clears gradients adds the new one to it, in the same memory. One that clears
    them, as most do, has the new gradient alone in `.grad`, to be clipped or unscaled; what was
    left is held here and added at the next step, for the memory of a second gradient.
    """

    def __init__(self) -> None:
        self.values: dict[Tensor, Tensor] = {}
        self._left: dict[Tensor, Tensor] = {}
        """The tensor that `.grad` was when it was left."""

    def add(self, params: Iterable[Tensor]) -> None:
        """Add what was left to the gradients that it is not in."""
        for p in params:
            if p.grad is not None and p in self.values and p.grad is not self._left.get(p):
                p.grad.add_(self.values[p])

    def keep(self, params: Iterable[Tensor]) -> None:
        """Take what is in the gradients for what the next ones are added to."""
        for p in params:
            if p.grad is None:
                continue
            if _is_alone(p.grad):
                self._left[p] = self.values[p] = p.grad
            else:  # DDP puts the next gradient in the same tensor, whether or not it was cleared
                self.values[p] = p.grad.clone()
                self._left.pop(p, None)
                p.grad.zero_()

    def load(self, values: Mapping[Tensor, Tensor]) -> None:
        """Put these values in the gradients and take them for what was left there."""
        self.values, self._left = dict(values), dict(values)
        for p, value in values.items():
            p.grad = value

    def __getstate__(self) -> dict[Tensor, Tensor]:
        return self.values

    def __setstate__(self, values: dict[Tensor, Tensor]) -> None:
        self.values, self._left = values, {}


def _is_alone(tensor: Tensor) -> bool:
    """Say whether nothing else is in a tensor's memory, as in the buffers of DDP, used again."""
    own = unsharded(tensor)
    return own.untyped_storage().nbytes() == own.numel() * own.element_size()
