"""The random order of an epoch: a permutation that can be asked for any place, at no cost of size.

Up to `SORTED_UP_TO` units the order is the sorting order of random bits, kept in memory. Above, it
is a keyed permutation of which every value is computed alone: an alternating Feistel network (Luby
and Rackoff, 1988; unbalanced halves as in Schneier and Kelsey, 1996) on the smallest power of two
that holds all units, repeated until the value falls among them ("cycle walking", Black and Rogaway,
2002). Its round function is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from steepest.data.splits import Positions

Bits = npt.NDArray[np.uint64]

SORTED_UP_TO = 2**20
ROUNDS = 8


@dataclass(frozen=True)
class EpochOrder:
    """The order in which an epoch visits its units, numbered from 0."""

    size: int
    """Units of the epoch."""
    draw: int
    """64 random bits of the epoch beside its order."""
    order: Positions | None
    """The order itself, where it is kept."""
    keys: Bits | None
    """The keys of the permutation, where it is not."""

    def units(self, places: Positions) -> Positions:
        """Return the units at these places of the order, each in [0, size)."""
        if self.order is not None:
            return self.order[places]
        assert self.keys is not None
        return _permuted(places, self.size, self.keys)


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, size: int) -> EpochOrder:
    """Return the order of an epoch: a function of the arguments alone, in every version of numpy.

    The bits are those of Philox (Salmon et al., 2011), which numpy keeps stable.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    draw = int(bits.random_raw())
    if size > SORTED_UP_TO:
        return EpochOrder(size, draw, None, bits.random_raw(ROUNDS))
    order = np.argsort(bits.random_raw(size), kind="stable").astype(np.int64)
    order.setflags(write=False)
    return EpochOrder(size, draw, order, None)


def _permuted(places: Positions, size: int, keys: Bits) -> Positions:
    bits = max(2, (size - 1).bit_length())
    values = _feistel(places.astype(np.uint64), bits, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], bits, keys)
    return values.astype(np.int64)


def _feistel(values: Bits, bits: int, keys: Bits) -> Bits:
    """Permute the numbers below 2**bits: each half in turn is changed by the other and a key."""
    width = np.uint64(bits // 2)
    low_mask = np.uint64(2 ** (bits // 2) - 1)
    high_mask = np.uint64(2 ** (bits - bits // 2) - 1)
    low, high = values & low_mask, values >> width
    for number, key in enumerate(keys):
        if number % 2 == 0:
            high = high ^ (_mixed(low + key) & high_mask)
        else:
            low = low ^ (_mixed(high + key) & low_mask)
    return (high << width) | low


def _mixed(x: Bits) -> Bits:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
