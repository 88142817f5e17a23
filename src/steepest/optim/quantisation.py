"""Block-wise dynamic 8-bit quantisation of optimizer states.

Dettmers, Lewis, Shleifer & Zettlemoyer, 2022, arXiv:2110.02861. A tensor is cut, row by row, into
blocks of `block_size` elements, of which the last may be shorter. A block keeps its largest
magnitude a in float32, and of each element the code whose value is nearest to element / a. The
values of the 256 codes are dense near zero: decade i = 0..6, from 10^(i - 7) to 10^(i - 6), is cut
into n equal intervals whose centres they are, n = 2^i with each sign where they are signed and
n = 2^(i + 1) where not; 0 and 1 complete them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

MIN_QUANTISED = 4096
"""Elements from which a state is worth quantising; smaller ones stay in full precision."""


def _code_values(*, signed: bool) -> Tensor:
    """Return the values of the codes, ascending, float32 `[256]`."""
    magnitudes = []
    for decade in range(7):
        n = 2 ** (decade if signed else decade + 1)
        centres = 0.1 + 0.9 * (torch.arange(n, dtype=torch.float64) + 0.5) / n
        magnitudes.append(10.0 ** (decade - 6) * centres)
    positive = torch.cat(magnitudes)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    values = torch.cat([positive, ends, *([-positive] if signed else [])])
    return values.sort().values.float()


class _Tables(NamedTuple):
    """What quantising looks up."""

    values: Tensor
    """Values of the codes, float32 `[256]`."""
    borders: Tensor
    """What lies half way between a code and the next, infinity after the last, `[256]`."""
    lowest: Tensor
    """Of all float32 numbers that share their upper 16 bits (seen as int32): the code of the lowest
    of them, uint8 `[65536]`. At most one border is among them, so another is at most one higher."""


def _tables(device: torch.device, signed: bool) -> _Tables:
    """Return the tables of a device, made once: copies at every step would hold up a GPU."""
    key = (device, signed)
    if key not in _TABLES:
        values = _code_values(signed=signed)
        middle = (values[:-1].double() + values[1:]) / 2
        upper = torch.arange(1 << 16, dtype=torch.int32) << 16
        # One more number on each side, as rounding to float32 may cross the end.
        ends = [
            torch.bucketize(bits.view(torch.float32), middle)
            for bits in (upper - 1, upper + MASK + 1)
        ]
        borders = functional.pad(middle, (0, 1), value=torch.inf)
        if device.type == "mps":  # It has no float64.
            borders = borders.float()
        found = (values, borders, torch.minimum(*ends).to(torch.uint8))
        _TABLES[key] = _Tables(*(table.to(device) for table in found))
    return _TABLES[key]


MASK = (1 << 16) - 1
_TABLES: dict[tuple[torch.device, bool], _Tables] = {}


def empty(like: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return codes and block magnitudes of zeros in the shape of `like`."""
    for signed in (False, True):
        _tables(like.device, signed)  # made here, as compiled code can't
    codes = torch.zeros_like(like, dtype=torch.uint8)
    return codes, like.new_zeros(-(-like.numel() // block_size), dtype=torch.float32)


def quantise(values: Tensor, block_size: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the codes of values, uint8 in their shape, and magnitudes, float32 `[blocks]`.

    A value half way between two codes gets the lower one. A block of zeros stays zero, and one that
    holds NaN is NaN when read.
    """
    padded = functional.pad(values.flatten(), (0, -values.numel() % block_size))
    absmax = padded.view(-1, block_size).abs().amax(-1).float()
    scaled = values / spread(torch.where(absmax > 0, absmax, 1.0), values, block_size)
    tables = _tables(values.device, signed)
    # A look-up and a comparison: torch.bucketize is a search, ten times as slow on a CPU.
    code = tables.lowest[(scaled.float().view(torch.int32) >> 16) & MASK].int()
    codes = code + (scaled > tables.borders.to(scaled.dtype)[code])
    return codes.to(torch.uint8), absmax


def dequantise(
    codes: Tensor,
    absmax: Tensor,
    block_size: int,
    *,
    signed: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the values that `quantise` kept: of each element its code's value times a."""
    values = _tables(codes.device, signed).values.to(dtype)
    return values[codes.int()] * spread(absmax.to(dtype), codes, block_size)


def spread(absmax: Tensor, like: Tensor, block_size: int) -> Tensor:
    """Return of each element of `like` its block's magnitude."""
    size = like.numel()
    if size % block_size == 0:
        return absmax.unsqueeze(-1).expand(-1, block_size).reshape(like.shape)
    # Not a division of whole numbers: torch 2.13 compiles that to a loop over whole blocks alone on
    # a CPU, which leaves out the last elements of vectors.
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    block = (torch.arange(size, device=like.device, dtype=dtype) / block_size).floor().int()
    return absmax[block].view(like.shape)
