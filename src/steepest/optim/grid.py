"""Equidistant quantisation in groups: a grid of 2^bits values per group of elements, row by row.

Of a group with values from a to b, s = max(b - a, 1e-5) / (2^bits - 1) is the distance of
neighbours and z = clamp(-round(a / s), 0, 2^bits - 1) the code of zero; code q stands for
(q - z) s. Zero is on every grid, so that a group of one sign is clipped to its range from zero.
The last group may be shorter. It is the quantiser of Q-GaLore's authors (Zhang et al., 2024,
arXiv:2407.08296, section 3.1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """Values as codes."""

    codes: Tensor
    """uint8, in the shape of the values."""
    scale: Tensor
    """Distance of neighbours in each group, `[groups]`, in the dtype of the values. A group that
    held NaN has NaN here, and is NaN when read."""
    zero: Tensor
    """Code of zero in each group, uint8 `[groups]`."""


def to_grid(values: Tensor, bits: int, group_size: int, uniform: Tensor | None = None) -> Grid:
    """Return the codes of values, with `bits` at most 8.

    Rounds to nearest (half to even), or with `uniform` numbers of [0, 1) in the shape of the values
    up with the probability of the distance from the lower neighbour, so that the mean is kept.
    """
    groups, top = _groups(values, group_size), 2.0**bits - 1
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / top
    zero = (-(low / scale).round()).clamp(0, top)
    scaled = groups / scale
    if uniform is None:
        rounded = scaled.round()
    else:
        rounded = scaled.floor() + (_groups(uniform, group_size) < scaled - scaled.floor())
    codes = (rounded + zero).clamp(0, top).to(torch.uint8)
    return Grid(_ungrouped(codes, values), scale.squeeze(1), zero.squeeze(1).to(torch.uint8))


def from_grid(grid: Grid, group_size: int) -> Tensor:
    """Return the values that codes stand for, in the dtype of the scales."""
    values = _groups(grid.codes, group_size).to(grid.scale.dtype)
    # In place, as it is what every pass over the weights allocates.
    values.sub_(grid.zero.to(values.dtype).unsqueeze(1)).mul_(grid.scale.unsqueeze(1))
    return _ungrouped(values, grid.codes)


def on_grid_of(values: Tensor, grid: Grid, group_size: int) -> Grid:
    """Return the codes to nearest of values, to 8 bits, on the grids that a group has already.

    A group whose values are not all on its grid, within their dtype, gets a new one.
    """
    scale, zero = grid.scale.unsqueeze(1), grid.zero.to(grid.scale.dtype).unsqueeze(1)
    groups = _groups(values.to(scale.dtype), group_size)
    codes = ((groups / scale).round() + zero).clamp(0, 255)
    back = ((codes - zero) * scale).to(values.dtype)
    kept = (back == groups.to(values.dtype)).all(dim=1, keepdim=True)
    new = to_grid(values.to(scale.dtype), 8, group_size)
    codes = torch.where(kept, codes.to(torch.uint8), _groups(new.codes, group_size))
    kept = kept.squeeze(1)
    scale, zero = (torch.where(kept, a, b) for a, b in zip(grid[1:], new[1:], strict=True))
    return Grid(_ungrouped(codes, values), scale, zero)


def pack(codes: Tensor) -> Tensor:
    """Return codes below 16 as `[ceil(n / 2)]` bytes, the first of two in the lower half."""
    pairs = _groups(codes, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the codes of a shape that `pack` packed."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=1)
    return _ungrouped(pairs, packed.new_empty(shape))


def _groups(values: Tensor, size: int) -> Tensor:
    """Return values in rows of one group each, the last one filled up with the last value."""
    flat = values.reshape(-1)
    if missing := -len(flat) % size:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.view(-1, size)


def _ungrouped(groups: Tensor, like: Tensor) -> Tensor:
    return groups.reshape(-1)[: like.numel()].view(like.shape)
