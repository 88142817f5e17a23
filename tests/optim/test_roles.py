"""Which role each parameter gets, and what follows from it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import problems
import pytest
import torch
from engine import NEEDS_FULL_RANK, assert_same_bits
from torch import Tensor, nn

import steepest
from steepest import Role
from steepest.errors import UserError
from steepest.optim import NamedRole


class Attention(nn.Module):
    """Names as in Hugging Face's models."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.output = nn.Linear(8, 8)


class HuggingFaceLike(nn.Module):
    """A causal model whose head has an unusual name and which says where it is."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(11, 8),
                "layers": nn.ModuleList([Attention(), Attention()]),
                "norm": nn.LayerNorm(8),
                "conv": nn.Conv2d(2, 4, 3),
            }
        )
        self.vocabulary = nn.Linear(8, 11, bias=False)
        self.temperature = nn.Parameter(torch.ones(()))
        if tied:
            self.vocabulary.weight = self.model["embed_tokens"].weight

    def get_output_embeddings(self) -> nn.Module:
        return self.vocabulary


def decays(optimizer: steepest.Optimizer) -> dict[int, tuple[str, float]]:
    """Return (rule, decay) of every parameter by identity."""
    return {
        id(p): (group["rule"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied: bool) -> None:
    model = problems.llama(tie_embeddings=tied)
    found = steepest.roles(model)
    expected = {name: role for name, (_, role) in problems.named_roles(model).items()}
    assert {name: named.role.value for name, named in found.items()} == expected
    assert ("lm_head.weight" in found) is not tied
    assert all(named.reason for named in found.values())
    if tied:
        assert "shared" in found["embed_tokens.weight"].reason
        assert "lm_head" in found["embed_tokens.weight"].reason


@pytest.mark.parametrize("tied", [False, True])
def test_model_that_names_its_output_embeddings(tied: bool) -> None:
    found = {k: v.role for k, v in steepest.roles(HuggingFaceLike(tied)).items()}
    assert found["model.embed_tokens.weight"] is Role.EMBEDDING
    assert found.get("vocabulary.weight") == (None if tied else Role.HEAD)
    assert found["model.layers.0.q_proj.weight"] is Role.HIDDEN
    assert found["model.layers.0.q_proj.bias"] is Role.VECTOR
    assert found["model.norm.weight"] is Role.VECTOR
    assert found["model.conv.weight"] is Role.HIDDEN
    assert found["temperature"] is Role.VECTOR


def test_a_projection_named_output_inside_a_layer_is_hidden() -> None:
    found = steepest.roles(HuggingFaceLike())
    assert found["model.layers.0.output.weight"].role is Role.HIDDEN


def test_a_head_met_before_the_embedding_it_is_tied_to() -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 9, bias=False), "table": nn.Embedding(9, 4)})
    model["table"].weight = model["head"].weight
    assert {k: v.role for k, v in steepest.roles(model).items()} == {"head.weight": Role.EMBEDDING}


def test_frozen_parameters_have_no_role_and_no_step() -> None:
    model = problems.llama()
    model.embed_tokens.weight.requires_grad_(False)
    assert "embed_tokens.weight" not in steepest.roles(model)
    assert id(model.embed_tokens.weight) not in decays(steepest.create("muon", model))


def test_hidden_matrices_and_heads_decay_unless_asked() -> None:
    model = problems.llama()
    named = problems.named_roles(model)
    asked: tuple[tuple[dict[str, list[Role | str]], set[str]], ...] = (
        ({}, {"hidden", "head"}),
        ({"decay_roles": []}, set()),
        ({"decay_roles": ["embedding", Role.VECTOR]}, {"embedding", "vector"}),
    )
    for options, decayed in asked:
        found = decays(steepest.create("lion", model, weight_decay=0.3, **options))  # type: ignore[arg-type]
        for p, role in named.values():
            assert found[id(p)] == ("lion", 0.3 if role in decayed else 0.0)


def test_muon_steps_hidden_matrices_and_adamw_the_rest() -> None:
    model = problems.llama()
    optimizer = steepest.create("muon", model, weight_decay=0.3, adam_weight_decay=0.2, adam_lr=0.5)
    found = decays(optimizer)
    wanted = {
        "hidden": ("muon", 0.3),
        "head": ("adamw", 0.2),
        "embedding": ("adamw", 0.0),
        "vector": ("adamw", 0.0),
    }
    for p, role in problems.named_roles(model).values():
        assert found[id(p)] == wanted[role]
    assert {g["lr"] for g in optimizer.param_groups if g["rule"] == "adamw"} == {0.5}


def test_muon_needs_roles() -> None:
    model = problems.llama()
    members: tuple[object, ...] = (
        list(model.parameters()),
        list(model.named_parameters()),
        [{"params": list(model.parameters())}],
    )
    for given in members:
        with pytest.raises(UserError, match=r"muon treats.*pass the nn\.Module.*'role'"):
            steepest.create("muon", given)  # type: ignore[arg-type]


def test_members_of_every_kind() -> None:
    table, matrix, gain = (nn.Parameter(torch.ones(s)) for s in ((5, 4), (4, 4), (4,)))
    given: tuple[list[object], ...] = (
        [table, matrix, gain],
        [("table", table), ("matrix", matrix), ("gain", gain)],
        [{"params": [table, matrix], "lr": 0.5}, {"params": gain}],
        [{"params": iter([("table", table)])}, {"params": [("matrix", matrix), ("gain", gain)]}],
    )
    for members in given:
        optimizer = steepest.create("adamw", members, lr=0.1)
        held: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(table), id(matrix), id(gain)}
    assert [g["lr"] for g in steepest.create("adamw", given[2], lr=0.1).param_groups] == [0.5, 0.1]
    named = steepest.create("adamw", given[1])
    assert sorted(n for g in named.param_groups for n in g["param_names"]) == [
        "gain",
        "matrix",
        "table",
    ]


def test_without_roles_matrices_decay_and_vectors_do_not() -> None:
    matrix, gain = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    found = decays(steepest.create("adamw", [matrix, gain], weight_decay=0.3))
    assert (found[id(matrix)][1], found[id(gain)][1]) == (0.3, 0.0)


def test_a_group_with_a_role_follows_it_and_its_own_values_win() -> None:
    table, head = nn.Parameter(torch.ones(5, 4)), nn.Parameter(torch.ones(5, 4))
    optimizer = steepest.create(
        "muon",
        [{"params": [table], "role": "embedding", "lr": 0.7}, {"params": [head], "role": "head"}],
        adam_lr=0.1,
        adam_weight_decay=0.2,
    )
    first, second = optimizer.param_groups
    assert (first["rule"], first["lr"], first["weight_decay"]) == ("adamw", 0.7, 0.0)
    assert (second["rule"], second["lr"], second["weight_decay"]) == ("adamw", 0.1, 0.2)


def test_a_role_of_each_single_parameter_is_not_lost_among_its_like() -> None:
    # Decayed and undecayed parameters must not end up in one group.
    model = problems.llama()
    optimizer = steepest.create("adamw", model, weight_decay=0.1)
    for group in optimizer.param_groups:
        kinds = {
            problems.named_roles(model)[n][1] in ("hidden", "head") for n in group["param_names"]
        }
        assert kinds == {group["weight_decay"] > 0}


# How a parameter's values lie in its tensor.


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


@pytest.mark.parametrize("name", ["c_attn", "qkv", "qkv_proj", "Wqkv", "to_qkv"])
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
    found = only(Fused("query_key_value", 36, num_heads=3))
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
    assert found["up_proj_bias"].role is Role.VECTOR
    assert not only(nn.Conv1d(4, 6, 3)).bank


class Odd(nn.Module):
    """A table, places, a layer of as many rows as each, and a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(19, 8), nn.Embedding(16, 8)
        self.up = nn.Linear(8, 16, bias=False)
        self.project = nn.Linear(8, 19, bias=False)
        self.A_log = nn.Parameter(torch.zeros(8, 4))


def test_what_could_be_a_head_or_no_matrix_is_a_doubt_and_warned_of() -> None:
    model = Odd()
    found = steepest.roles(model)
    assert "as many rows as an embedding" in found["project.weight"].doubt
    assert "no layer's weight" in found["A_log"].doubt
    assert not found["up.weight"].doubt
    with pytest.warns(UserWarning, match="stepped as hidden") as caught:
        steepest.create("muon", model)
    said = [str(warning.message) for warning in caught]
    assert len(said) == 2
    assert said[0].startswith("A_log is stepped as hidden, but it is no layer's weight")
    assert "create(..., roles={'project.weight': ...})" in said[1]
    assert {warning.filename for warning in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steepest.create("adamw", model)  # There it makes no difference.
        roles: dict[str, Any] = {"project.*": "head", "A_log": Role.VECTOR}
        optimizer = steepest.create("muon", model, roles=roles)
    found_rules = decays(optimizer)
    assert found_rules[id(model.project.weight)][0] == "adamw"
    assert found_rules[id(model.A_log)][0] == "adamw"
    assert found_rules[id(model.up.weight)][0] == "muon"


def test_a_flattened_matrix_is_warned_of() -> None:
    model = nn.Linear(8, 4)
    model.weight = nn.Parameter(torch.zeros(16))
    with pytest.warns(UserWarning, match="weight is stepped as vector, but it is flattened"):
        steepest.create("muon", model)


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


@pytest.mark.parametrize("pattern", ["0.out.weigth", "*.query_key_values.weight"])
def test_a_pattern_that_matches_nothing_is_named_with_the_nearest(pattern: str) -> None:
    model = nn.Sequential(Fused("query_key_value", 36))
    nearest = "0.out.weight" if "out" in pattern else "0.query_key_value.weight"
    with pytest.raises(UserError, match=f"did you mean '{nearest}'"):
        steepest.create("muon", model, roles={pattern: "vector"})
    with pytest.raises(UserError, match=r"role 'vektor'; did you mean 'vector'"):
        steepest.create("muon", model, roles={"*.out.weight": "vektor"})


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


# Models of Hugging Face, from configurations.

SIZES: dict[str, Any] = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.slow
def test_gpt2_of_hugging_face() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 12, "n_embd": 12, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**SIZES, **sizes))
    found = steepest.roles(model)
    table = found["transformer.wte.weight"]
    assert table.role is Role.EMBEDDING
    assert "shared by transformer.wte.weight and lm_head" in table.reason
    assert "lm_head.weight" not in found
    assert found["transformer.wpe.weight"].role is Role.EMBEDDING
    hidden = {name: named for name, named in found.items() if named.role is Role.HIDDEN}
    assert len(hidden) == 8
    for name, named in hidden.items():
        assert named.transposed
        assert named.split == ((12, 12, 12) if "c_attn" in name else None)
        # There are as many places as rows, which is no reason for doubt.
        assert not named.doubt
    assert found["transformer.h.1.attn.c_attn.weight"].heads == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = steepest.create("muon", model)
    tokens = torch.arange(10).view(1, -1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    state = optimizer.state[model.transformer.h[0].attn.c_attn.weight]
    assert {k: tuple(v.shape) for k, v in state.items() if k != "step"} == {
        f"momentum.{block}": (12, 12) for block in range(3)
    }


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_llama_of_hugging_face(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **sizes, **heads, tie_word_embeddings=tied))
    found = steepest.roles(model)
    assert found["model.embed_tokens.weight"].role is Role.EMBEDDING
    assert ("lm_head.weight" in found) is not tied
    assert tied or found["lm_head.weight"].role is Role.HEAD
    attention = "model.layers.0.self_attn"
    assert found[f"{attention}.q_proj.weight"].heads == 4
    assert found[f"{attention}.k_proj.weight"].heads == 2
    hidden = [name for name, named in found.items() if named.role is Role.HIDDEN]
    assert len(hidden) == 7
    assert not any(named.doubt or named.transposed or named.split for named in found.values())


@pytest.mark.slow
def test_other_models_of_hugging_face() -> None:
    import transformers as hf

    sizes = {**SIZES, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 4}
    grouped = {**sizes, "num_key_value_heads": 2, "intermediate_size": 24}
    phi = hf.Phi3ForCausalLM(hf.Phi3Config(**grouped, pad_token_id=0))
    fused = steepest.roles(phi)["model.layers.0.self_attn.qkv_proj.weight"]
    assert (fused.split, fused.heads) == ((12, 6, 6), 4)
    neox = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**sizes, intermediate_size=24))
    mixed = steepest.roles(neox)["gpt_neox.layers.0.attention.query_key_value.weight"]
    assert mixed.split is None
    assert mixed.doubt
    mixtral = hf.MixtralForCausalLM(hf.MixtralConfig(**grouped, num_local_experts=3))
    oss = hf.GptOssForCausalLM(hf.GptOssConfig(**grouped, num_local_experts=3, head_dim=4))
    for model, turned in ((mixtral, False), (oss, True)):
        found = steepest.roles(model)
        for name in ("gate_up_proj", "down_proj"):
            bank = found[f"model.layers.0.mlp.experts.{name}"]
            assert (bank.bank, bank.transposed) == (True, turned)
    assert steepest.roles(oss)["model.layers.0.mlp.experts.down_proj_bias"].role is Role.VECTOR
