"""The states between the chunks of a recurrence: what can't run in parallel, as one operator.

torch.compile sees one call instead of a loop that it would unroll: at 4,096 tokens and 24 layers
some 20,000 operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("steepest::chunk_states", mutates_args=())
def chunk_states(k: Tensor, u: Tensor, w: Tensor | None, decay: Tensor) -> Tensor:
    """Return the state at the start of every chunk, [batch, heads, chunks, key, value].

        S_0 = 0,  S_{n+1} = diag(decay_n) S_n + k_n^T (u_n - w_n S_n)

    k and w are [batch, heads, chunks, chunk, key], u is [batch, heads, chunks, chunk, value], decay
    is [batch, heads, chunks, key], or [..., 1] where all channels decay alike. Without w nothing is
    subtracted. States have the dtype of u; they are summed in float32 at least.
    """
    batch, heads, chunks, _, keys = k.shape
    states = u.new_empty(batch, heads, chunks, keys, u.shape[-1])
    state = torch.zeros_like(states[:, :, 0], dtype=torch.promote_types(u.dtype, torch.float32))
    for n in range(chunks):
        states[:, :, n] = state
        value = u[:, :, n] if w is None else u[:, :, n] - w[:, :, n] @ states[:, :, n]
        state = decay[:, :, n, :, None] * state + k[:, :, n].mT @ value
    return states


@chunk_states.register_fake
def _(k: Tensor, u: Tensor, w: Tensor | None, decay: Tensor) -> Tensor:
    return u.new_empty(*k.shape[:3], k.shape[-1], u.shape[-1])


@torch.library.custom_op("steepest::chunk_state_gradients", mutates_args=())
def chunk_state_gradients(grad: Tensor, k: Tensor, w: Tensor | None, decay: Tensor) -> Tensor:
    """Return the gradient of the state at the end of every chunk, G_n, shaped like `grad`.

    G_{n-1} = grad_n + diag(decay_n) G_n - w_n^T k_n G_n, where grad_n is what else the loss knows
    of the state at the start of chunk n.
    """
    gradients = torch.empty_like(grad)
    g = torch.zeros_like(grad[:, :, 0], dtype=torch.promote_types(grad.dtype, torch.float32))
    for n in reversed(range(grad.shape[2])):
        gradients[:, :, n] = g
        g = decay[:, :, n, :, None] * g + grad[:, :, n]
        if w is not None:
            g = g - w[:, :, n].mT @ (k[:, :, n] @ gradients[:, :, n])
    return gradients


@chunk_state_gradients.register_fake
def _(grad: Tensor, k: Tensor, w: Tensor | None, decay: Tensor) -> Tensor:
    return torch.empty_like(grad)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    k, u, w, decay, states = ctx.saved_tensors
    after = chunk_state_gradients(grad.contiguous(), k, w, decay)
    values = u if w is None else u - w @ states
    grad_values = k @ after
    exact = decay.dtype
    grad_decay = (after.to(exact) * states.to(exact)).sum(-1)
    if decay.shape[-1] == 1:
        grad_decay = grad_decay.sum(-1, keepdim=True)
    grad_w = None if w is None else -grad_values @ states.mT
    return values @ after.mT, grad_values, grad_w, grad_decay


chunk_states.register_autograd(_differentiate, setup_context=_keep)
