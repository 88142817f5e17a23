"""Roles in plain modules, whatever their names: tables, vocabularies and blocks tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest import Role
from steepest.optim import NamedRole

VOCABULARY, POSITIONS, HIDDEN, WIDE = 29, 64, 8, 20
"""As many positions as a model of characters has: more than tokens."""


def build(**parts: Any) -> Any:
    """Return a module of modules, lists of modules, shapes of parameters, and attributes."""
    module: Any = nn.Module()
    for name, part in parts.items():
        if isinstance(part, list):
            module.add_module(name, nn.ModuleList(part))
        elif isinstance(part, tuple):
            module.register_parameter(name, nn.Parameter(torch.zeros(part)))
        else:
            setattr(module, name, part)
    return module


def linear(inputs: int = HIDDEN, outputs: int = HIDDEN) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def table(rows: int = VOCABULARY) -> nn.Embedding:
    return nn.Embedding(rows, HIDDEN)


def block(output: str = "o_proj") -> nn.Module:
    attention = build(q_proj=linear(), k_proj=linear(), v_proj=linear(), **{output: linear()})
    mlp = build(up=linear(HIDDEN, WIDE), output=linear(WIDE, HIDDEN))
    return build(norm=nn.RMSNorm(HIDDEN), attention=attention, mlp=mlp)


def named(model: nn.Module, role: Role) -> set[str]:
    """Return the names of the parameters of a role, vectors by shape left out."""
    parameters = dict(model.named_parameters())
    found = steepest.roles(model)
    return {name for name in found if found[name].role is role and parameters[name].ndim > 1}


def doubts(model: nn.Module) -> dict[str, str]:
    return {name: found.doubt for name, found in steepest.roles(model).items() if found.doubt}


def nano_gpt() -> nn.Module:
    body = build(wte=table(), wpe=table(POSITIONS), h=[block(), block()], ln_f=nn.LayerNorm(HIDDEN))
    return build(transformer=body, lm_head=linear(HIDDEN, VOCABULARY))


def titan() -> nn.Module:
    layers = nn.ModuleDict({"0": block("wo"), "1": block("wo")})
    return build(tok_embeddings=table(), layers=layers, output=linear(HIDDEN, VOCABULARY))


def neo_x() -> nn.Module:
    return build(embed_in=table(), layers=[block("dense")], embed_out=linear(HIDDEN, VOCABULARY))


def bert() -> nn.Module:
    embeddings = build(
        word_embeddings=table(),
        position_embeddings=table(POSITIONS),
        token_type_embeddings=table(2),
    )
    predictions = build(transform=build(dense=linear()), decoder=linear(HIDDEN, VOCABULARY))
    layers = build(layer=[block("output"), block("output")])
    return build(embeddings=embeddings, encoder=layers, cls=build(predictions=predictions))


def factorised() -> nn.Module:
    """A table narrower than the hidden states, and projections on either side of the layers."""
    return build(
        embed_tokens=nn.Embedding(VOCABULARY, 4),
        embed_positions=table(POSITIONS),
        project_out=linear(HIDDEN, 4),
        project_in=linear(4, HIDDEN),
        layers=[block("out_proj")],
        to_words=linear(4, VOCABULARY),
    )


def two_vocabularies() -> nn.Module:
    return build(
        source=table(41),
        target=table(),
        encoder=build(layers=[block()]),
        decoder=build(layers=[block()]),
        generator=linear(HIDDEN, VOCABULARY),
    )


def many_heads() -> nn.Module:
    heads = [linear(HIDDEN, VOCABULARY) for _ in range(2)]
    return build(codes=[table(), table()], layers=[block()], heads=heads)


def one_layer() -> nn.Module:
    """Layers that are not numbered, one of them called like a head."""
    attention = nn.MultiheadAttention(HIDDEN, 2, bias=False)
    mlp = build(up=linear(HIDDEN, WIDE), down=linear(WIDE, HIDDEN))
    words = linear(HIDDEN, VOCABULARY)
    return build(embed=table(), attention=attention, mlp=mlp, classify=words)


def chain() -> nn.Module:
    layer = nn.TransformerEncoderLayer(HIDDEN, 2, WIDE)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(table(), encoder, linear(HIDDEN, VOCABULARY))


def bytes_as_wide_as_hidden() -> nn.Module:
    return build(embed=table(HIDDEN), project=linear(), layers=[block()], lm_head=linear())


def table_of_its_own_kind() -> nn.Module:
    """A vocabulary that only the config tells."""
    embed = type("WordEmbedding", (nn.Module,), {})()
    embed.weight = nn.Parameter(torch.zeros(VOCABULARY, HIDDEN))
    config = type("Config", (), {"vocab_size": VOCABULARY})()
    return build(
        config=config, embed=embed, layers=[block()], project=linear(), words=linear(8, VOCABULARY)
    )


MODELS: dict[Callable[[], nn.Module], tuple[set[str], set[str]]] = {
    nano_gpt: ({"transformer.wte", "transformer.wpe"}, {"lm_head"}),
    titan: ({"tok_embeddings"}, {"output"}),
    neo_x: ({"embed_in"}, {"embed_out"}),
    bert: (
        {f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")},
        {"cls.predictions.decoder"},
    ),
    factorised: ({"embed_tokens", "embed_positions"}, {"to_words"}),
    two_vocabularies: ({"source", "target"}, {"generator"}),
    many_heads: ({"codes.0", "codes.1"}, {"heads.0", "heads.1"}),
    one_layer: ({"embed"}, {"classify"}),
    chain: ({"0"}, {"2"}),
    bytes_as_wide_as_hidden: ({"embed"}, {"lm_head"}),
    table_of_its_own_kind: ({"embed"}, {"words"}),
}
"""Modules of embeddings and of heads; every other matrix is hidden, and nothing is in doubt."""


@pytest.mark.parametrize("make", MODELS)
def test_heads_and_embeddings(make: Callable[[], nn.Module]) -> None:
    model = make()
    embeddings, heads = ({f"{path}.weight" for path in paths} for paths in MODELS[make])
    assert named(model, Role.EMBEDDING) == embeddings
    assert named(model, Role.HEAD) == heads
    assert not named(model, Role.VECTOR)
    assert not doubts(model)


def test_a_model_in_a_list_is_no_block() -> None:
    model = nn.ModuleList([nano_gpt(), titan()])
    assert named(model, Role.HEAD) == {"0.lm_head.weight", "1.output.weight"}
    assert not doubts(model)


def test_a_table_tied_to_a_head_of_any_name() -> None:
    for make, name in ((nano_gpt, "transformer.wte"), (titan, "tok_embeddings")):
        model = make()
        head = next(iter(MODELS[make][1]))
        model.get_submodule(head).weight = model.get_submodule(name).weight
        found = steepest.roles(model)
        assert found[f"{name}.weight"].role is Role.EMBEDDING
        assert found[f"{name}.weight"].reason == f"shared by {name}.weight and {head}"
        assert not named(model, Role.HEAD)


def test_low_rank_adapters_are_matrices_and_that_to_the_words_a_head() -> None:
    def adapted(outputs: int) -> nn.Module:
        down, up = build(default=linear(HIDDEN, 2)), build(default=linear(2, outputs))
        return build(base_layer=linear(HIDDEN, outputs), lora_A=down, lora_B=up)

    model = build(
        embed=table(), layers=[build(q_proj=adapted(HIDDEN))], lm_head=adapted(VOCABULARY)
    )
    for matrix in (model.embed, model.lm_head.base_layer, model.layers[0].q_proj.base_layer):
        matrix.requires_grad_(False)
    found = {name: found.role.value for name, found in steepest.roles(model).items()}
    assert found == {
        "layers.0.q_proj.lora_A.default.weight": "hidden",
        "layers.0.q_proj.lora_B.default.weight": "hidden",
        "lm_head.lora_A.default.weight": "hidden",
        "lm_head.lora_B.default.weight": "head",
    }


def test_a_matrix_that_is_also_a_head_is_one() -> None:
    model = build(embed=table(), layers=[block()], lm_head=linear(HIDDEN, VOCABULARY))
    model.layers[0].predict = linear(HIDDEN, VOCABULARY)
    model.layers[0].predict.weight = model.lm_head.weight
    found = steepest.roles(model)["layers.0.predict.weight"]
    assert (found.role, found.doubt) == (Role.HEAD, "")


def test_a_classifier_is_known_by_its_number_of_classes() -> None:
    model = build(num_classes=3, layers=[block()], pool=linear(), predict=linear(HIDDEN, 3))
    assert named(model, Role.HEAD) == {"predict.weight"}
    assert not doubts(model)


# Mixtures of experts, and convolutions.


def mixture(router: nn.Module, **banks: tuple[int, ...]) -> Any:
    return build(embed=table(), layers=[build(router=router, experts=build(**banks))])


@pytest.mark.parametrize("turned", [False, True])
def test_stacked_experts_are_known_by_their_router(turned: bool) -> None:
    up, down = (5, WIDE, HIDDEN), (5, HIDDEN, WIDE)
    sides = (down, up) if turned else (up, down)
    model = mixture(linear(HIDDEN, 5), gate_up_proj=(5, *sides[0][1:]), down_proj=sides[1])
    found = steepest.roles(model)
    for name in ("gate_up_proj", "down_proj"):
        bank = found[f"layers.0.experts.{name}"]
        assert (bank.role, bank.bank, bank.transposed, bank.doubt) == ("hidden", True, turned, "")
    # The router is a matrix as others; as a vector AdamW steps it.
    assert found["layers.0.router.weight"].role is Role.HIDDEN
    given = steepest.roles(model, {"*.router.weight": "vector"})
    assert given["layers.0.router.weight"].role is Role.VECTOR


def test_a_router_that_is_no_layer_and_experts_that_are_always_on() -> None:
    config = type("Config", (), {"experts": 5})()
    experts = build(up_proj=(5, WIDE, HIDDEN), down_proj=(5, HIDDEN, WIDE))
    moe = build(config=config, router=(4, HIDDEN), experts=experts)
    model = build(embed=table(), layers=[build(moe=moe)])
    assert {path for path, named in steepest.roles(model).items() if named.bank} == {
        "layers.0.moe.experts.up_proj",
        "layers.0.moe.experts.down_proj",
    }
    assert steepest.roles(model)["layers.0.moe.router"].role is Role.HIDDEN
    assert not doubts(model)


def test_experts_of_modules_are_matrices() -> None:
    experts = [build(w1=linear(HIDDEN, WIDE), w2=linear(WIDE, HIDDEN)) for _ in range(3)]
    moe = build(gate=linear(HIDDEN, 3), experts=experts)
    model = build(embed=table(), layers=[build(moe=moe)], head=linear(HIDDEN, VOCABULARY))
    assert len(named(model, Role.HIDDEN)) == 7
    assert not doubts(model)


def test_filters_of_channels_are_vectors_and_other_kernels_hidden() -> None:
    model = build(
        embed=table(),
        layers=[
            build(
                short=nn.Conv1d(HIDDEN, HIDDEN, 4, groups=HIDDEN),
                mixing=nn.Conv1d(HIDDEN, HIDDEN, 4),
                grouped=nn.Conv1d(HIDDEN, HIDDEN, 4, groups=2),
                q_conv=build(weight=(HIDDEN, 1, 4)),
                A_log=(4,),
                q_proj=linear(),
            )
        ],
        head=linear(HIDDEN, VOCABULARY),
    )
    assert named(model, Role.VECTOR) == {"layers.0.short.weight", "layers.0.q_conv.weight"}
    hidden = {f"layers.0.{name}.weight" for name in ("mixing", "grouped", "q_proj")}
    assert named(model, Role.HIDDEN) == hidden
    assert not doubts(model)
    rules = {
        name: group["rule"]
        for group in steepest.create("muon", model).param_groups
        for name in group["param_names"]
    }
    assert rules["layers.0.short.weight"] == rules["layers.0.A_log"] == "adamw"
    assert rules["layers.0.mixing.weight"] == "muon"


def test_decays_of_a_state_space_model_are_vectors() -> None:
    mixer = build(A_log=(WIDE, 4), D=(WIDE,), in_proj=linear(HIDDEN, WIDE))
    model = build(embed=table(), layers=[build(mixer=mixer, out_proj=linear(WIDE, HIDDEN))])
    assert named(model, Role.VECTOR) == {"layers.0.mixer.A_log"}
    assert not doubts(model)


def test_gains_of_several_dimensions_are_vectors() -> None:
    model = build(first=nn.LayerNorm((3, 4)), second=nn.RMSNorm((3, 4)))
    found = steepest.roles(model)
    assert {named.role for named in found.values()} == {Role.VECTOR}
    assert found["first.weight"] == NamedRole(Role.VECTOR, "gains of a LayerNorm")
