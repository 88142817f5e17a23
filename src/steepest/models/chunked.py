"""Linear recurrences over time in chunks: matrix products inside a chunk, a state between chunks.

The arguments and what is computed are those of `steepest.models.recurrences`. Decays only ever
enter as exp(b_i - b_j) with j <= i, where b is the sum of their logarithms from the beginning of
the chunk, which falls: no exponent is positive, so nothing overflows however strong the decay, and
the relative error is that of rounding b. Decays, states and the inverse of the delta rule are in
float32 at least; the operands of products have the dtype of the values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from steepest.models.chunk_states import chunk_states

CHUNK = 64


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, segments: Tensor | None = None
) -> Tensor:
    """Return [batch, time, heads, value] (Yang et al., 2023, arXiv:2312.06635)."""
    dtype, time = v.dtype, v.shape[1]
    exact = torch.promote_types(dtype, torch.float32)
    q, k, b = (_chunks(x).to(exact) for x in (q, k, log_decay))
    q, v, b = q * q.shape[-1] ** -0.5, _chunks(v), b.cumsum(-2)
    last = b[..., -1:, :]
    entering, leaving, across = q * b.exp(), k * (last - b).exp(), last.squeeze(-2).exp()
    scores = _decayed_products(q, k, b, dtype)
    if segments is not None:
        borders = _borders(segments)
        entering = entering * borders.entered[..., None]
        leaving = leaving * borders.left[..., None]
        across = across * borders.crossed[..., None]
        scores = scores * borders.same
    states = chunk_states(leaving.to(dtype), v, None, across)
    return _sequence(entering.to(dtype) @ states + scores @ v, time)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Return [batch, time, heads, value] by the UT transform (Yang et al., 2024, arXiv:2406.06484).

    With decay as in Yang et al., 2024, arXiv:2412.06464. What a chunk writes obeys
    (1 + A) value = beta (v - exp(b) k S) with A_ij = beta_i exp(b_i - b_j) k_i . k_j for j < i,
    where S is the state before the chunk; so value = u - w S. For keys of norm 1 and beta up to 1
    no element of (1 + A)^-1 exceeds 1, being beta times a product of contractions between two keys:
    the explicit inverse is safe.
    """
    dtype, time = v.dtype, v.shape[1]
    exact = torch.promote_types(dtype, torch.float32)
    q, k, v = _chunks(q * q.shape[-1] ** -0.5), _chunks(k), _chunks(v)
    beta = _chunks(beta).to(exact)[..., None]
    decays = _decays(log_decay, segments, beta)
    gram = k.to(exact) @ k.to(exact).mT
    inverse = torch.linalg.solve_triangular(
        beta * gram * decays.between,
        torch.eye(CHUNK, dtype=exact, device=v.device),
        upper=False,
        unitriangular=True,
    ).to(dtype)
    u = inverse @ (beta * v).to(dtype)
    w = inverse @ (beta * decays.entering * k).to(dtype)
    states = chunk_states((decays.leaving * k).to(dtype), u, w, decays.across)
    scores = ((q @ k.mT) * decays.between).to(dtype)
    inside = scores @ (u - w @ states)
    return _sequence((decays.entering * q).to(dtype) @ states + inside, time)


class _Decays(NamedTuple):
    """What remains of a head's state from one position to another; 0 across a border."""

    between: Tensor
    """[batch, heads, chunks, chunk, chunk]: from position j (last) to i; 0 for j > i."""
    entering: Tensor
    """[batch, heads, chunks, chunk, 1]: from the end of the chunk before to a position."""
    leaving: Tensor
    """[batch, heads, chunks, chunk, 1]: from a position to the end of the chunk."""
    across: Tensor
    """[batch, heads, chunks, 1]: from the end of the chunk before to the end of the chunk."""


def _decays(log_decay: Tensor | None, segments: Tensor | None, beta: Tensor) -> _Decays:
    """Return the decays, in the dtype of beta [batch, heads, chunks, chunk, 1]."""
    b = torch.zeros_like(beta)
    if log_decay is not None:
        b = _chunks(log_decay).to(beta.dtype).cumsum(-1)[..., None]
    visible = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=beta.device).tril()
    entering, leaving, across = b.exp(), (b[..., -1:, :] - b).exp(), b[..., -1, :].exp()
    if segments is not None:
        borders = _borders(segments)
        visible = visible & borders.same
        entering = entering * borders.entered[..., None]
        leaving = leaving * borders.left[..., None]
        across = across * borders.crossed[..., None]
    between = (b - b.mT).masked_fill(~visible, -torch.inf).exp()
    return _Decays(between, entering, leaving, across)


def _decayed_products(q: Tensor, k: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [..., chunk, chunk]: sum over channels of q_i k_j exp(b_i - b_j), 0 for j > i.

    As a matrix product it takes a factor of i and one of j, exp(b_i - b_m) exp(b_m - b_j), neither
    above 1 if m is in between. So blocks are doubled from one position to the chunk, and where the
    second half of a block sees the first, m is the last position of the first.
    """
    products = (q * k).sum(-1).to(dtype)[..., None, None]
    half = 1
    while half < CHUNK:
        halves = (*q.shape[:-2], -1, 2, half, q.shape[-1])
        (_, q_second), (k_first, _), (b_first, b_second) = (
            x.reshape(halves).unbind(-3) for x in (q, k, b)
        )
        middle = b_first[..., -1:, :]
        seeing = (q_second * (b_second - middle).exp()).to(dtype)
        corner = seeing @ (k_first * (middle - b_first).exp()).to(dtype).mT
        first, second = products[..., 0::2, :, :], products[..., 1::2, :, :]
        products = torch.cat((F.pad(first, (0, half)), torch.cat((corner, second), -1)), -2)
        half *= 2
    return products.squeeze(-3)


class _Borders(NamedTuple):
    """Where documents meet, seen from the chunks; bool, to be broadcast over heads."""

    same: Tensor
    """[batch, 1, chunks, chunk, chunk]: whether two positions are of the same document."""
    entered: Tensor
    """[batch, 1, chunks, chunk]: whether a position's document began before the chunk."""
    left: Tensor
    """[batch, 1, chunks, chunk]: whether it lasts to the end of the chunk."""
    crossed: Tensor
    """[batch, 1, chunks]: whether one document does both."""


def _borders(segments: Tensor) -> _Borders:
    number = _chunks(segments[..., None])
    last = number[..., -1]
    before = F.pad(last[..., :-1], (1, 0))
    return _Borders(
        number[..., :, None] == number[..., None, :],
        number == before[..., None],
        number == last[..., None],
        before == last,
    )


def _chunks(x: Tensor) -> Tensor:
    """Turn [batch, time, heads, ...] into [batch, heads, chunks, CHUNK, ...], with zeros added."""
    missing = -x.shape[1] % CHUNK
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    return x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]).movedim(3, 1)


def _sequence(x: Tensor, time: int) -> Tensor:
    """Turn [batch, heads, chunks, CHUNK, size] into [batch, time, heads, size]."""
    return x.movedim(1, 3).flatten(1, 2)[:, :time]
