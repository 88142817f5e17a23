"""SwiGLU experts whose matrices are stacked and multiplied together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.models.layers import compute_dtype


class Experts(nn.Module):
    """MLPs down(silu(gate(x)) * up(x)), each [experts, out, in] a stack of their matrices."""

    def __init__(self, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))

    def of_tokens(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """Return the gated sum over each token's experts, for x [tokens, hidden].

        `chosen` and `gates` are [tokens, experts per token]. Tokens are sorted by expert, so that
        every expert multiplies its own, however many they are; shapes stay the same.
        """
        each = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        numbers = torch.arange(len(self.gate_proj), device=x.device)
        ends = (chosen.flatten()[:, None] == numbers).sum(0).cumsum(0).to(torch.int32)
        # A permutation of copies, not a gather: its gradient adds nothing up in random order.
        rows = x[:, None].expand(-1, each, -1).flatten(0, 1)[order]
        y = self._mlp(rows, lambda a, b: grouped_mm(a, b.transpose(1, 2), ends))
        back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device))
        y = y[back].view(len(x), each, -1)
        return (y * gates[..., None].to(y.dtype)).sum(1)

    def on_tokens(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """Return the gated sum over the experts that chose each token, for x [tokens, hidden].

        `chosen` and `gates` are [experts, tokens per expert].
        """
        y = self._mlp(x[chosen], lambda a, b: a @ b.transpose(1, 2))
        y = y * gates[..., None].to(y.dtype)
        total = torch.zeros(x.shape, dtype=y.dtype, device=x.device)
        return total.index_add(0, chosen.flatten(), y.flatten(0, 1))

    def _mlp(self, x: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        dtype = compute_dtype(x)
        gate, up, down = (w.to(dtype) for w in (self.gate_proj, self.up_proj, self.down_proj))
        x = x.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return multiply(F.silu(multiply(x, gate)) * multiply(x, up), down)


# torch's own is not traced in float32, and autocast and autograd do not see the groups otherwise.
@torch.library.custom_op("steepest::grouped_mm", mutates_args=())
def grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Return each group of rows of a [rows, in] times its matrix of b [groups, in, out].

    Of two matrices, a [out, rows] and b [rows, in], the products [groups, out, in] of their groups.
    Group i ends before row `ends[i]`, int32.
    """
    return F.grouped_mm(a, b, offs=ends)


@grouped_mm.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(*([len(ends)] if b.ndim == 2 else []), a.shape[0], b.shape[-1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    a, b, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return grouped_mm(grad, b.transpose(1, 2), ends), grouped_mm(a.T, grad, ends), None


grouped_mm.register_autograd(_gradient, setup_context=_keep)
