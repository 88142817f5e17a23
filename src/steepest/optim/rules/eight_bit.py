"""Elementwise rules whose states are kept in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.errors import UserError
from steepest.optim import quantisation
from steepest.optim.live import Hyper
from steepest.optim.quantisation import MIN_QUANTISED
from steepest.optim.recipe import Part, Recipe
from steepest.optim.roles import Role
from steepest.optim.rule import State, compute_dtype
from steepest.optim.rules.adam import AdamW
from steepest.optim.rules.sign import Lion
from steepest.optim.wrapper import Wrapper

SIGNED = frozenset({"exp_avg", "exp_avg_diff", "momentum"})
"""States of elementwise rules that average gradients or steps over tens of steps. Slower averages
and sums stand still in 8 bits, as what a step adds is less than half of a code."""
UNSIGNED = frozenset({"exp_avg_sq", "max_exp_avg_sq", "exp_avg_var", "square_avg", "hessian"})
"""States that average what is never negative."""

ABSMAX = "_absmax"
"""What is added to a state's name for its blocks' magnitudes."""


@dataclass(frozen=True)
class Quantised(Wrapper):
    """Block-wise 8-bit states (Dettmers et al., 2022, arXiv:2110.02861).

    In place of a moment s of at least 4096 elements, blocks of block_size elements keep
    a = max |s| and of each element the code q whose value is nearest to s / a.
    A step reads s = a value(q), uses the new s as it is, and then stores it.

    Codes are a dynamic tree, dense near zero, with a sign for averages of gradients and without for
    averages of squares. Slow averages, sums and copies of weights stay in full precision. A square
    below 1.6e-7 of its block's largest is kept as 0, so that where then g = 0 the step is m / eps:
    rows of rare tokens do that, which is why `adam8bit` and `lion8bit` give embeddings full states.
    """

    block_size: int = 256

    prefix: ClassVar[str] = "quantised"
    elementwise: ClassVar[bool] = True
    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse rules that do not step elements alone, or have no moment."""
        super().__post_init__()
        name = type(self.inner).__name__
        if not self.inner.elementwise:
            raise UserError(
                f"quantised keeps the states of elementwise rules in 8 bits, but {name} is not "
                "one; name quantised before other wrappers."
            )
        states = self.inner.init(torch.empty(1, device="meta"))
        if not states.keys() & (SIGNED | UNSIGNED):
            raise UserError(
                f"quantised finds nothing to keep in 8 bits in {name}, whose states are "
                f"{', '.join(states) or 'none'}; it knows {', '.join(sorted(SIGNED | UNSIGNED))}."
            )

    def init(self, param: Tensor) -> State:
        """Return the inner state, codes and magnitudes in place of large moments."""
        state: State = {}
        for name, value in self.inner.init(param).items():
            if name in SIGNED | UNSIGNED and value.numel() >= MIN_QUANTISED:
                state[name], state[name + ABSMAX] = quantisation.empty(value, self.block_size)
            else:
                state[name] = value
        return state

    def _read(self, state: State, like: Tensor) -> State:
        """Return the inner state from what is kept of it."""
        dtype = compute_dtype(like.dtype)
        found: State = {}
        for name, value in state.items():
            if name + ABSMAX in state:
                signed, absmax = name in SIGNED, state[name + ABSMAX]
                found[name] = quantisation.dequantise(
                    value, absmax, self.block_size, signed=signed, dtype=dtype
                )
            elif not name.endswith(ABSMAX):
                found[name] = value
        return found

    def _kept(self, new: State, state: State) -> State:
        """Return what is kept of new inner state."""
        found: State = {}
        for name, value in new.items():
            if name + ABSMAX in state:
                found[name], found[name + ABSMAX] = quantisation.quantise(
                    value, self.block_size, signed=name in SIGNED
                )
            else:
                found[name] = value
        return found

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the inner direction, and what is kept of the new state."""
        direction, new = self.inner.update(grad, param, self._read(state, grad), h)
        return direction, self._kept(new, state)

    def move(
        self, param: Tensor, direction: Tensor, state: State, h: Hyper
    ) -> tuple[Tensor, State]:
        """Do as the inner rule."""
        moved, new = self.inner.move(param, direction, self._read(state, param), h)
        return moved, self._kept(new, state)

    def start(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Do as the inner rule."""
        return self._kept(self.inner.start(grad, param, self._read(state, grad), h), state)

    def prepare(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Do as the inner rule."""
        return self._kept(self.inner.prepare(grad, param, self._read(state, grad), h), state)

    def refresh(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Do as the inner rule."""
        return self._kept(self.inner.refresh(grad, param, self._read(state, grad), h), state)

    def observe(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Do as the inner rule."""
        return self._kept(self.inner.observe(grad, param, self._read(state, grad), h), state)

    def measure(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> dict[str, Tensor]:
        """Do as the inner rule."""
        return self.inner.measure(grad, param, self._read(state, grad), h)

    def average(self, param: Tensor, state: State, h: Hyper) -> Tensor:
        """Do as the inner rule."""
        return self.inner.average(param, self._read(state, param), h)


EMBEDDING = frozenset({Role.EMBEDDING})
DIFFERS = (
    "bitsandbytes quantises embeddings, too, unless told otherwise.",
    "On GPUs bitsandbytes gives a negative moment that rounds to zero the smallest negative code, "
    "decays after the step, and skips elements whose gradient is not finite; on CPUs it resolves "
    "no less than 2e-5 of a block's largest.",
    "torchao quantises only tensors whose size is a multiple of the block size.",
)


def _bytes(moments: int) -> str:
    quantised = f"{moments} * (m * n + 4 * -(-m * n // block_size))"
    return f"{quantised} if m * n >= {MIN_QUANTISED} else {4 * moments} * m * n"


RECIPES = (
    Recipe(
        "adam8bit",
        Quantised(inner=AdamW()),
        family="light state",
        year=2022,
        paper="Dettmers et al., arXiv:2110.02861",
        state=_bytes(2),
        parts=(Part("embedding", EMBEDDING, AdamW(), follows=True),),
        differs=DIFFERS,
    ),
    Recipe(
        "lion8bit",
        Quantised(inner=Lion()),
        family="light state",
        year=2022,
        paper="Dettmers et al., arXiv:2110.02861; Lion arXiv:2302.06675",
        state=_bytes(1),
        parts=(Part("embedding", EMBEDDING, Lion(), follows=True),),
        differs=(*DIFFERS, "bitsandbytes had coupled decay, inside the sign, until 2026."),
    ),
)
