"""Causal attention of packed documents by FlexAttention, which compiles a block-sparse kernel.

The mask is kept by blocks, time x time / 128^2 numbers, and made on the device without a read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Tokens in a block of queries or keys."""
SMALLEST_HEAD = 16
"""Channels of a head that the kernel takes at least."""
VARIANTS = 64
"""Kernels that a process compiles at most. A model has up to six, with gradients and without, for
one row, for one number of rows and for any; by default torch stops at eight."""


def block_mask(begins: Tensor) -> BlockMask:
    """Return which blocks of keys each block of queries sees, and which of them wholly.

    `begins`, int64 [batch, time], is where in the row each token's document begins. What a token
    sees is one stretch, from there to itself, so blocks need no look at time x time pairs.
    """
    begins = begins.int()
    time = begins.shape[1]
    index = torch.arange(-(-time // BLOCK), dtype=torch.int32, device=begins.device)
    ends = BLOCK * (index + 1)
    # Query block i sees key blocks from `seen` on and itself, those from `whole` on wholly, which
    # a block with less than BLOCK tokens can't: its other queries are not there to see them.
    seen = begins[:, ::BLOCK] // BLOCK
    whole = (begins[:, (ends - 1).clamp(max=time - 1)] + BLOCK - 1) // BLOCK
    whole = torch.where(ends > time, index, torch.minimum(whole, index))
    own = index[:, None]
    partial = (whole - seen)[..., None]
    # Behind the blocks that count the list may hold any.
    partly_seen = torch.where(index < partial, seen[..., None] + index, own)
    wholly_seen = torch.minimum(whole[..., None] + index, own)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (begins[b, q] <= k) & (k <= q)

    return BlockMask.from_kv_blocks(
        (whole - seen + 1)[:, None],
        partly_seen[:, None],
        (index - whole)[:, None],
        wholly_seen[:, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(time, time),
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """Return attention under a block mask, [batch, heads, time, head_size], of one dtype.

    Keys and values may have fewer heads.
    """
    grouped = q.shape[1] != k.shape[1]
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    with torch._dynamo.config.patch(recompile_limit=VARIANTS):
        return kernel()(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)


@functools.cache
def kernel() -> Callable[..., Tensor]:
    """Return flex_attention compiled, without which it would hold all scores."""
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, fullgraph=True)
    return compiled
