"""Adam with fewer numbers: one second moment for a block of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.errors import UserError
from steepest.optim.live import Hyper
from steepest.optim.recipe import Recipe
from steepest.optim.roles import NamedRole
from steepest.optim.rule import State, ema
from steepest.optim.rules.adam import TwoMoments


@dataclass(frozen=True)
class AdamMini(TwoMoments):
    """Adam-mini (Zhang et al., 2024, arXiv:2406.16793, Algorithm 1).

    m <- b1 m + (1 - b1) g
    v_b <- b2 v_b + (1 - b2) mean of g^2 over block b
    u = m / (1 - b1^t) / (sqrt(v_b / (1 - b2^t)) + eps)

    A block is a part of the rows. Query and key matrices have one per attention head, other
    matrices (value, output, MLP, embedding, head) one per row, vectors are one block. In a fused
    matrix of query, key and value every head of each is a block. `blocks` other than 0 cuts each
    tensor into so many instead.
    """

    blocks: int = 0

    elementwise: ClassVar[bool] = False
    reads_param: ClassVar[bool] = False

    def init(self, param: Tensor) -> State:
        """Return the first moment and one second moment per block, zero."""
        blocks = self.blocks or (param.shape[0] if param.ndim >= 2 else 1)
        rows = param.shape[0] if param.ndim else 1
        if rows % blocks:
            raise UserError(
                f"A tensor of shape {tuple(param.shape)} can't be cut into {blocks} blocks of "
                f"equal numbers of rows."
            )
        return {"exp_avg": torch.zeros_like(param), "exp_avg_sq": param.new_zeros(blocks)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the first moment over the root of its block's second, both corrected."""
        b1, b2 = h.betas
        m = ema(state["exp_avg"], grad, b1)
        blocks = state["exp_avg_sq"].shape[0]
        v = ema(state["exp_avg_sq"], (grad * grad).reshape(blocks, -1).mean(-1), b2)
        scale = h.scale1 / (h.root_scale2 * v.sqrt() + h.eps)
        direction = (m.reshape(blocks, -1) * scale.unsqueeze(-1)).reshape(m.shape)
        return direction, {"exp_avg": m, "exp_avg_sq": v}


def head_blocks(named: NamedRole, tensor: Tensor) -> Mapping[str, Any]:
    """Return the number of blocks of a query or key matrix; other tensors have the rule's."""
    if named.heads is None:
        return {}
    rows = tensor.shape[1] if named.transposed else tensor.shape[0]
    queries = rows if named.split is None else named.split[0]
    if named.heads == 0 or queries % named.heads:
        split = "" if named.split is None else f", split={named.split}"
        raise UserError(
            f"adam_mini keeps one second moment per attention head of a query or key matrix, but "
            f"how many heads one of shape {tuple(tensor.shape)} has is not clear. Say so with "
            f"create(..., roles={{NAME: NamedRole(Role.HIDDEN, heads=...{split})}})."
        )
    return {"blocks": rows // (queries // named.heads)}


RECIPES = (
    Recipe(
        "adam_mini",
        AdamMini(),
        family="light state",
        year=2024,
        paper="Zhang et al., arXiv:2406.16793",
        state="4 * m * n + 4 * (blocks or m)",
        adapt=head_blocks,
        differs=(
            "adam-mini 1.1.1 finds blocks by parameter names: what it does not recognise is one "
            "block, every bias has its own second moments, and nothing whose name contains norm, "
            "ln or bias is decayed.",
            "Its versions before August 2024, and pytorch-optimizer's, step embeddings and heads "
            "as Adam, and have one block per matrix but for query and key.",
        ),
    ),
)
