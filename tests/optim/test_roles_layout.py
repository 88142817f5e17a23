"""How the values of a parameter lie in its tensor, and steps block by block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from engine import NEEDS_FULL_RANK, assert_same_bits
from torch import Tensor, nn

import steepest
from steepest import Role
from steepest.errors import UserError
from steepest.optim import NamedRole

# Models that are a few layers alone end in one that may be a head.
pytestmark = pytest.mark.filterwarnings("ignore:.*it may be an output layer")


class Conv1D(nn.Module):
    """A linear layer stored [in, out], as in GPT-2 of Hugging Face."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))


class Fused(nn.Module):
    """An attention block with query, key and value in one matrix."""

    def __init__(self, name: str, rows: int, **attributes: int) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(12, rows, bias=False))
        self.out = nn.Linear(12, 12, bias=False)
        for attribute, value in attributes.items():
            setattr(self, attribute, value)


class Experts(nn.Module):
    """Experts in one tensor."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.is_transposed = turned
        self.up_proj = nn.Parameter(torch.zeros(3, 8, 5))
        self.up_proj_bias = nn.Parameter(torch.zeros(3, 8))


def only(model: nn.Module) -> NamedRole:
    """Return the role of a model's first parameter."""
    return next(iter(steepest.roles(model).values()))


@pytest.mark.parametrize("name", ["c_attn", "QKV", "qkv_proj", "Wqkv", "to_qkv"])
def test_query_key_value_in_one_of_equal_sizes(name: str) -> None:
    found = only(Fused(name, 36, n_heads=3))
    assert (found.role, found.split, found.heads) == (Role.HIDDEN, (12, 12, 12), 3)
    assert "query, key and value, 12, 12, 12 rows" in found.reason
    assert not found.doubt


@pytest.mark.parametrize(
    ("rows", "attributes", "split"),
    [
        (24, {"head_dim": 3, "num_heads": 4}, (12, 6, 6)),
        (18, {"head_size": 3, "n_head": 4}, (12, 3, 3)),
        (48, {"head_dim": 8, "num_heads": 4}, (32, 8, 8)),  # Heads wider than hidden / heads.
    ],
)
def test_grouped_query_sizes_follow_from_the_head(
    rows: int, attributes: dict[str, int], split: tuple[int, ...]
) -> None:
    assert only(Fused("qkv_proj", rows, **attributes)).split == split


def test_sizes_that_nothing_tells_are_a_doubt() -> None:
    for model in (Fused("qkv_proj", 24), Fused("qkv_proj", 23, head_dim=3, num_heads=4)):
        found = only(model)
        assert found.split is None
        assert "sizes are unknown" in found.doubt


def test_a_mixed_order_is_a_doubt() -> None:
    class CodeGenAttention(Fused):
        """As in transformers, which mixes them in spite of the name."""

    class Sharded(CodeGenAttention):
        """As FSDP2 makes them."""

    mixed = (Fused, "Query_Key_Value"), (CodeGenAttention, "qkv_proj"), (Sharded, "qkv_proj")
    for kind, name in mixed:
        found = only(kind(name, 36, num_heads=3))
        assert found.split is None
        assert "one matrix" in found.doubt


def test_attention_of_torch() -> None:
    found = steepest.roles(nn.MultiheadAttention(8, 2))
    fused = found["in_proj_weight"]
    assert (fused.split, fused.heads) == ((8, 8, 8), 2)
    assert found["out_proj.weight"].split is None
    assert found["in_proj_bias"].role is Role.VECTOR
    apart = steepest.roles(nn.MultiheadAttention(8, 2, kdim=4, vdim=6))
    matrices = {name: role for name, role in apart.items() if role.role is Role.HIDDEN}
    assert matrices.keys() == {
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "out_proj.weight",
    }
    assert all(role.split is None and not role.doubt for role in matrices.values())


def test_encoder_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = steepest.roles(nn.TransformerEncoder(layer, 2))
    hidden = {name for name, named in found.items() if named.role is Role.HIDDEN}
    kinds = ("self_attn.in_proj", "self_attn.out_proj", "linear1.", "linear2.")
    assert len(hidden) == 8
    assert all("weight" in name and any(kind in name for kind in kinds) for name in hidden)
    assert {found[name].split for name in hidden} == {None, (8, 8, 8)}
    assert {n.role for name, n in found.items() if name not in hidden} == {Role.VECTOR}


@pytest.mark.parametrize("turned", [False, True])
def test_banks_of_experts(turned: bool) -> None:
    found = steepest.roles(Experts(turned))
    bank = found["up_proj"]
    assert (bank.role, bank.bank, bank.transposed) == (Role.HIDDEN, True, turned)
    assert not bank.doubt
    assert found["up_proj_bias"].role is Role.VECTOR
    assert not only(nn.Conv1d(4, 6, 3)).bank


def test_roles_by_pattern_and_with_layout() -> None:
    model = nn.Sequential(Fused("query_key_value", 36), Fused("query_key_value", 36))
    given: dict[str, Any] = {
        "*.query_key_value.*": NamedRole(Role.HIDDEN, split=(12, 12, 12)),
        "1.out.weight": "vector",
    }
    found = steepest.roles(model, given)
    assert [found[f"{i}.query_key_value.weight"].split for i in (0, 1)] == [(12, 12, 12)] * 2
    assert not any(named.doubt for named in found.values())
    assert (found["0.out.weight"].role, found["1.out.weight"].role) == ("hidden", "vector")
    assert found["1.out.weight"].reason == "given"


def test_blocks_that_are_not_the_rows_are_refused() -> None:
    model = Fused("query_key_value", 36)
    wrong = NamedRole(Role.HIDDEN, split=(12, 12))
    optimizer = steepest.create("muon", model, roles={"query_key_value.*": wrong})
    model.query_key_value.weight.grad = torch.ones(36, 12)
    with pytest.raises(UserError, match=r"shape \(36, 12\).*12, 12 rows.*do not add up to 36"):
        optimizer.step()


# Stepped block by block it is as if the blocks were parameters of their own.

MATRIX = ("muon", "soap", "adafactor")


def stepped(name: str, model: nn.Module, grads: Iterable[Tensor], **options: Any) -> None:
    """Take steps on functions of the elements of gradients, one per parameter."""
    held = list(grads)
    optimizer = steepest.create(name, model, lr=0.1, weight_decay=0.1, **options)
    for scale in (5.0, 1.0, 3.0):
        for p, g in zip(model.parameters(), held, strict=True):
            p.grad = torch.sin(scale * g)
        optimizer.step()


def draws(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for shape in shapes]


def filled(model: nn.Module, *values: Tensor) -> nn.Module:
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)
    return model


@pytest.mark.parametrize("turned", [False, True])
def test_muon_on_a_fused_matrix_is_muon_on_three(turned: bool) -> None:
    value, grad = draws((24, 8), (24, 8))
    whole: Any = nn.Module()
    whole.c_attn = Conv1D(8, 24) if turned else nn.Linear(8, 24, bias=False)
    filled(whole, value.mT if turned else value)
    stepped("muon", whole, [grad.mT if turned else grad])
    blocks = filled(nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3)), *value.chunk(3))
    stepped("muon", blocks, grad.chunk(3))
    result = whole.c_attn.weight.mT if turned else whole.c_attn.weight
    assert_same_bits(result.chunk(3), list(blocks.parameters()))
    one: Any = nn.Module()
    one.c_attn = nn.Linear(8, 24, bias=False)
    filled(one, value)
    stepped("muon", one, [grad], roles={"c_attn.weight": NamedRole(Role.HIDDEN)})
    assert not torch.allclose(one.c_attn.weight, result, atol=1e-3)


def test_muon_on_blocks_of_different_sizes() -> None:
    value, grad = draws((16, 8), (16, 8))
    sizes = (8, 4, 4)
    whole: Any = nn.Module()
    whole.mixed = nn.Linear(8, 16, bias=False)
    filled(whole, value)
    stepped("muon", whole, [grad], roles={"mixed.*": NamedRole(Role.HIDDEN, split=sizes)})
    blocks = nn.ModuleList(nn.Linear(8, size, bias=False) for size in sizes)
    filled(blocks, *value.split(sizes))
    stepped("muon", blocks, grad.split(sizes))
    assert_same_bits(whole.mixed.weight.split(sizes), list(blocks.parameters()))


@pytest.mark.parametrize("name", MATRIX)
def test_a_matrix_stored_in_out_is_the_transposed_layer(name: str) -> None:
    square = ((6, 6), (9, 9))
    shapes = square if name in NEEDS_FULL_RANK else ((12, 5), (5, 12), *square)
    values, grads = draws(*shapes), draws(*shapes, seed=1)
    layers: Any = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in shapes)
    turned: Any = nn.ModuleList(Conv1D(n, m) for m, n in shapes)
    stepped(name, filled(layers, *values), grads)
    stepped(name, filled(turned, *(v.mT for v in values)), [g.mT for g in grads])
    for p, q, v in zip(layers.parameters(), turned.parameters(), values, strict=True):
        assert (p - v).norm() > 0.1
        assert (p - q.mT).norm() <= 1e-6 * (p - v).norm()


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("turned", [False, True])
def test_a_bank_is_its_matrices(name: str, turned: bool) -> None:
    value, grad = draws((3, 8, 5), (3, 8, 5))
    bank: Any = Experts(turned)
    del bank.up_proj_bias
    filled(bank, value)
    given: Any = [Conv1D(8, 5) if turned else nn.Linear(5, 8, bias=False) for _ in range(3)]
    apart = filled(nn.ModuleList(given), *value)
    stepped(name, bank, [grad])
    stepped(name, apart, grad)
    assert_same_bits(list(bank.up_proj), list(apart.parameters()))
    assert (bank.up_proj - value).norm() > 0.1
