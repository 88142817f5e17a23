"""Twins for tests of int8 weights: a model that stores codes, and one of floats on their grids."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import steepest
from steepest import NamedRole, Role, int8_weights
from steepest.optim import Int8Weight

GROUP = 32
ROLES: dict[str, Any] = {
    "head.weight": "head",
    "experts.gate": NamedRole(Role.HIDDEN, bank=True),
}


class Conv1D(nn.Module):
    """A layer that stores its matrix [in, out], under the name that transformers has for it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Experts(nn.Module):
    """A stack of matrices, of which each token goes through one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(3, 16, 12) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return sum(functional.linear(x, self.gate[i]) for i in range(3)) / 3


class Small(nn.Module):
    """A matrix of every layout, one whose size no group divides, and what is not hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 21)
        self.down = nn.Linear(21, 12)
        self.turned = Conv1D(12, 12)
        self.experts = Experts()
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = functional.gelu(self.up(self.embed(tokens)))
        x = self.experts(self.turned(functional.gelu(self.down(x))))
        return functional.cross_entropy(self.head(self.norm(x)), tokens.roll(1))


def pair(group_size: int = GROUP, dtype: torch.dtype = torch.float32) -> tuple[Small, Small]:
    """Return a model in int8 and one of floats with the same weights, on the same grids."""
    torch.manual_seed(0)
    plain = Small().to(dtype)
    stored = int8_weights(copy.deepcopy(plain), group_size=group_size, roles=ROLES)
    plain.load_state_dict(stored.state_dict())
    return stored, plain


def matrices(model: nn.Module) -> dict[str, Int8Weight]:
    return {n: p for n, p in model.named_parameters() if isinstance(p, Int8Weight)}


def make(name: str, model: nn.Module, **options: Any) -> steepest.Optimizer:
    given = {"lr": 0.02, "weight_decay": 0.1, "rank": 3, "update_interval": 4, "compile": False}
    return steepest.create(name, model, roles=ROLES, **{**given, **options})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(11, (20,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(tokens).backward()
        optimizer.step()


def assert_same(stored: nn.Module, plain: nn.Module) -> None:
    ours, theirs = dict(stored.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        values = p.dequantize() if isinstance(p, Int8Weight) else p
        assert torch.equal(values, theirs[name]), name
