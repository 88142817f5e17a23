"""Causal softmax attention over whole sequences or over the documents packed into them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Up to this length the CPU kernel of scaled_dot_product_attention is faster in float32 than in
# bfloat16, most of all backward (5 times at 128 positions and heads of 16); at 512 it is slower.
CPU_FLOAT32_ATTENTION_LENGTH = 256


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return causal attention [batch, heads, time, head_size] in the dtype of `v`.

    Keys and values may have fewer heads, which queries then share in order. `mask`, bool
    [batch, 1, time, time], says which positions (last) each one sees, instead of all up to itself.
    `scale` multiplies the scores, 1 / sqrt(head_size) if not given.
    """
    short = q.shape[2] <= CPU_FLOAT32_ATTENTION_LENGTH
    dtype = torch.float32 if v.device.type == "cpu" and short else v.dtype
    with torch.autocast(v.device.type, enabled=False):
        y = F.scaled_dot_product_attention(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return y.to(v.dtype)
