"""LLaMA and GPT-2 against Hugging Face's own, with copied weights: logits, losses, gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from steepest.models import GPT2, GPT2Config, LanguageModel, Llama, LlamaConfig, build

transformers = pytest.importorskip("transformers")

LLAMA = LlamaConfig(
    vocab_size=61, hidden_size=32, layers=2, heads=4, intermediate_size=40, max_sequence_length=48
)
LLAMA_NAMES = {
    "embed_tokens": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "mlp_norm": "post_attention_layernorm",
}
GPT = GPT2Config(vocab_size=61, hidden_size=32, layers=2, heads=4, max_sequence_length=48)


def randomise(model: LanguageModel) -> LanguageModel:
    """Make gains and biases visible and logits far from flat."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=noise) * 0.3)
            else:
                p.mul_(5)
    return model


def llama_name(name: str) -> str:
    return ".".join(LLAMA_NAMES.get(part, part) for part in name.split("."))


def hugging_face_llama(model: Llama) -> tuple[nn.Module, dict[str, str]]:
    c = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.key_value_heads,
            intermediate_size=c.intermediate_size,
            rms_norm_eps=c.norm_eps,
            rope_theta=c.rope_theta,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            max_position_embeddings=c.max_sequence_length,
            tie_word_embeddings=c.tie_embeddings,
        )
    )
    names = {name: llama_name(name) for name, _ in model.named_parameters()}
    weights = {names[name]: p.detach().clone() for name, p in model.named_parameters()}
    if c.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights)
    return theirs, names


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_heads": 2}, {"tie_embeddings": True}, {"rope_theta": 500_000.0, "norm_eps": 1e-6}],
    ids=str,
)
def test_llama(changes: dict[str, object]) -> None:
    model = randomise(build(dataclasses.replace(LLAMA, **changes)))
    assert isinstance(model, Llama)
    theirs, names = hugging_face_llama(model)
    compare(model, theirs)
    their_grads = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        close(p.grad, their_grads[names[name]].grad)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": True, "activation": "gelu_tanh"},
        {"bias": True, "tie_embeddings": False, "intermediate_size": 48},
        {"bias": False},
    ],
    ids=str,
)
def test_gpt2(changes: dict[str, object]) -> None:
    model = randomise(build(dataclasses.replace(GPT, **changes)))
    assert isinstance(model, GPT2)
    c = model.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size,
            n_embd=c.hidden_size,
            n_layer=c.layers,
            n_head=c.heads,
            n_inner=c.mlp_size,
            n_positions=c.max_sequence_length,
            activation_function="gelu_new" if c.activation == "gelu_tanh" else "gelu",
            layer_norm_epsilon=c.norm_eps,
            tie_word_embeddings=c.tie_embeddings,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    pairs = gpt2_pairs(model, theirs)
    with torch.no_grad():
        for p in theirs.parameters():
            p.zero_()
        for module in theirs.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1)
        for ours, view in pairs:
            view(lambda p: p.data).copy_(ours)
    compare(model, theirs)
    for ours, view in pairs:
        close(ours.grad, view(lambda p: p.grad))


def gpt2_pairs(model: GPT2, theirs: nn.Module):  # type: ignore[no-untyped-def]
    """Return our parameters, each with where its values are in theirs: a view of `of(p)`.

    Hugging Face keeps [in, out] matrices, query, key and value side by side.
    """
    size = model.config.hidden_size
    pairs = [
        (model.embed_tokens.weight, lambda of: of(theirs.transformer.wte.weight)),
        (model.embed_positions.weight, lambda of: of(theirs.transformer.wpe.weight)),
    ]
    if not model.config.tie_embeddings:
        pairs.append((model.lm_head.weight, lambda of: of(theirs.lm_head.weight)))

    def add(ours: nn.Module, module: nn.Module, part: int | None = None) -> None:
        columns = slice(None) if part is None else slice(part * size, (part + 1) * size)
        if ours.weight.ndim == 2:
            pairs.append((ours.weight, lambda of: of(module.weight)[:, columns].T))
        else:
            pairs.append((ours.weight, lambda of: of(module.weight)))
        if ours.bias is not None:
            pairs.append((ours.bias, lambda of: of(module.bias)[columns]))

    add(model.norm, theirs.transformer.ln_f)
    for layer, block in zip(model.layers, theirs.transformer.h, strict=True):
        for part, name in enumerate("qkv"):
            add(getattr(layer.attention, f"{name}_proj"), block.attn.c_attn, part)
        add(layer.attention.o_proj, block.attn.c_proj)
        add(layer.attention_norm, block.ln_1)
        add(layer.mlp_norm, block.ln_2)
        add(layer.mlp.up_proj, block.mlp.c_fc)
        add(layer.mlp.down_proj, block.mlp.c_proj)
    return pairs


def compare(model: LanguageModel, theirs: nn.Module) -> None:
    """Compare logits and losses; leave gradients in both."""
    tokens = torch.randint(61, (3, 33), generator=torch.Generator().manual_seed(0))
    output = theirs(input_ids=tokens[:, :-1])
    close(model(tokens[:, :-1]), output.logits)
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    expected = nn.functional.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()


def close(ours: Tensor | None, theirs: Tensor) -> None:
    assert ours is not None
    # Biases of keys have no gradient but rounding: softmax does not see them.
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-8


def test_the_parallel_block_is_the_papers_sum() -> None:
    model = randomise(build(dataclasses.replace(GPT, parallel_block=True, layers=1)))
    (layer,) = model.layers
    assert layer.mlp_norm is None
    tokens = torch.arange(20)[None]
    x = model.embed_tokens(tokens) + model.embed_positions.weight[:20]
    y = layer.attention_norm(x)
    expected = model.norm(x + layer.attention(y, None) + layer.mlp(y))
    torch.testing.assert_close(model.features(tokens).hidden, expected)
