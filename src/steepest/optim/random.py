"""Random numbers that are a function of a key: the same in any order, batch, device and process.

A generator's state would tie a tensor's numbers to what was drawn before it, and can't be mapped
over stacks. Here element i is a hash of (key, i), so that a rule stays a pure function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def new_key(seed: int, index: int) -> Tensor:
    """Return the key of the parameter with this index, int64 `[]`."""
    return _mix(_mix(torch.tensor(seed & MASK)) ^ torch.tensor(index & MASK))


def fold(key: Tensor, number: Tensor | int) -> Tensor:
    """Return a key that depends on `key` and a whole number (a step, a purpose), int64 `[]`."""
    number = number if isinstance(number, int) else number.to(torch.int64)
    return _mix(key ^ ((number * 0x3C6EF372 + 0x1B873593) & MASK))


def bits(key: Tensor, shape: Sequence[int], stream: int = 0) -> Tensor:
    """Return uniform whole numbers below 2^32, int64 `shape`."""
    count = torch.arange(math.prod(shape), device=key.device)
    return _mix(_mix(count ^ key) + fold(key, stream)).view(tuple(shape))


def uniform(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers uniform in [0, 1): multiples of 2^-24, exact in float32."""
    return (bits(key, shape) >> 8).to(dtype) * 2.0**-24


def normal(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal numbers (Box-Muller)."""
    radius = ((bits(key, shape, 1) >> 8).to(dtype) + 1) * 2.0**-24
    angle = (bits(key, shape, 2) >> 8).to(dtype) * (2.0**-24 * 2 * math.pi)
    return (-2 * radius.log()).sqrt() * angle.cos()


def sign(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return -1 or 1 with equal odds."""
    return ((bits(key, shape) >> 31) * 2 - 1).to(dtype)


def _mix(x: Tensor) -> Tensor:
    """Return a bijective hash of whole numbers below 2^32 (constants of Wellons' lowbias32).

    The second constant is minus 2^32 so that no product leaves int64.
    """
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * (0x846CA68B - (1 << 32))) & MASK
    return x ^ (x >> 16)
