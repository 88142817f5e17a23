"""Recurrences over time with a matrix as state: gated linear attention and the delta rule.

Shapes: queries and keys q, k are [batch, time, heads, key], values v [batch, time, heads, value],
beta [batch, time, heads]. `log_decay`, finite logarithms of the decay and so at most 0, is
[batch, time, heads, key] for gated linear attention and [batch, time, heads] for the delta rule.
`segments`, int64 [batch, time], numbers the documents packed into each sequence (see
`steepest.models.documents.segments`): the state is zero where one begins. Results are
[batch, time, heads, value] in the dtype of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.models import chunked, flash_linear_attention


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, segments: Tensor | None = None
) -> Tensor:
    """Return `step_by_step` without beta, computed in parallel (arXiv:2312.06635)."""
    with torch.autocast(v.device.type, enabled=False):
        if flash_linear_attention.serves(k, v):
            return flash_linear_attention.attend("chunk_gla", [q, k, v, log_decay], segments)
        return chunked.gated_linear_attention(q, k, v, log_decay, segments)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Return `step_by_step` with beta, computed in parallel (arXiv:2406.06484, arXiv:2412.06464).

    Keys should have norm 1 and beta be between 0 and 1: otherwise the state can grow without bound.
    """
    with torch.autocast(v.device.type, enabled=False):
        if not flash_linear_attention.serves(k, v):
            return chunked.delta_rule(q, k, v, beta, log_decay=log_decay, segments=segments)
        if log_decay is None:
            return flash_linear_attention.attend("chunk_delta_rule", [q, k, v, beta], segments)
        return flash_linear_attention.attend(
            "chunk_gated_delta_rule", [q, k, v, log_decay, beta], segments
        )


def step_by_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Return the outputs o_t, one step after the other: the definition of the recurrences.

        S = diag(exp(log_decay_t)) S_{t-1}
        S_t = S + k_t u_t^T,  u_t = v_t  or, with beta,  beta_t (v_t - S^T k_t)
        o_t = S_t^T q_t / sqrt(key)

    `log_decay` has either of its shapes; without it nothing decays.
    """
    dtype = v.dtype
    exact = torch.promote_types(dtype, torch.float32)
    q, k, v = (x.to(exact) for x in (q, k, v))
    decay = torch.ones_like(k[..., :1]) if log_decay is None else log_decay.to(exact).exp()
    decay = decay if decay.ndim == k.ndim else decay[..., None]
    if segments is not None:
        begins = segments[:, 1:] != segments[:, :-1]
        decay = torch.cat((decay[:, :1], decay[:, 1:] * ~begins[..., None, None]), dim=1)
    state = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None, :])
    outputs = []
    for t in range(v.shape[1]):
        state = decay[:, t, :, :, None] * state
        value = v[:, t]
        if beta is not None:
            known = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
            value = beta[:, t, :, None].to(exact) * (value - known)
        state = state + k[:, t, :, :, None] * value[:, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    result: Tensor = torch.stack(outputs, dim=1) * q.shape[-1] ** -0.5
    return result.to(dtype)
