"""Which tokens go through which experts, with which weight, and how evenly.

Token choice is that of Shazeer et al., 2017 (arXiv:1701.06538), without a capacity: no token is
dropped. Expert choice is that of Zhou et al., 2022 (arXiv:2202.09368).
"""

from __future__ import annotations

import torch
from torch import Tensor

NUMBERS = ("balance", "router_z", "router_entropy", "largest_load")
"""What is told of a layer's routing.

balance         experts * sum over experts of the share of tokens that go through one times its mean
                odds (Switch Transformer, Fedus et al., 2021, arXiv:2101.03961, equation 4): the
                number of experts per token where all is even
router_z        mean square of log Z of the logits (ST-MoE, Zoph et al., 2022, arXiv:2202.08906)
router_entropy  entropy of the mean odds, in nats: the logarithm of the experts where all is even
largest_load    the most loaded expert's share of the work over an even share
"""


def by_tokens(logits: Tensor, experts: int, gates: str) -> tuple[Tensor, Tensor]:
    """Return the experts [tokens, experts] that tokens choose, int64, and their gates, float32.

    `logits` is [tokens, all experts]. With "topk_softmax" the gates are the softmax of the chosen
    logits, with "softmax_topk" their part of the softmax of all.
    """
    chosen = logits.topk(experts, dim=-1).indices
    if gates == "topk_softmax":
        return chosen, _picked(logits, chosen).softmax(-1)
    return chosen, _picked(logits.softmax(-1), chosen)


def _picked(x: Tensor, chosen: Tensor) -> Tensor:
    """Return x[token, chosen[token, i]] as sums over all experts.

    torch 2.13's inductor loses the gradient of a gather here when the auxiliary losses have one,
    too.
    """
    numbers = torch.arange(x.shape[-1], device=x.device)
    return torch.where(chosen[..., None] == numbers, x[:, None], 0).sum(-1)


def capacity(tokens: int, experts: int, factor: float) -> int:
    """Return how many of the tokens each expert chooses."""
    return min(tokens, max(1, int(factor * tokens / experts)))


def by_experts(logits: Tensor, tokens: int, gates: str) -> tuple[Tensor, Tensor]:
    """Return the tokens [all experts, tokens] that experts choose, int64, and their gates, float32.

    They choose by each token's softmax over experts, which is the gate with "softmax_topk", as in
    the paper. With "topk_softmax" the gates of a token's experts are divided by their sum.
    """
    odds = logits.softmax(-1)
    gate, chosen = odds.T.topk(tokens, dim=-1)
    if gates == "topk_softmax":
        sums = torch.zeros_like(odds[:, 0]).index_add(0, chosen.flatten(), gate.flatten())
        gate = gate / sums[chosen]
    return chosen, gate


def load(chosen: Tensor, experts: int) -> Tensor:
    """Return the share of tokens that go through each expert, float32 [experts]."""
    numbers = torch.arange(experts, device=chosen.device)
    return (chosen[..., None] == numbers).any(1).float().mean(0)


def numbers(logits: Tensor, load: Tensor) -> Tensor:
    """Return `NUMBERS` of a layer, float32, with gradients through the logits."""
    mean_odds = logits.softmax(-1).mean(0)
    return torch.stack(
        (
            logits.shape[-1] * (load * mean_odds).sum(),
            logits.logsumexp(-1).square().mean(),
            -(mean_odds * mean_odds.clamp(min=1e-30).log()).sum(),
            load.max() / load.mean(),
        )
    )
