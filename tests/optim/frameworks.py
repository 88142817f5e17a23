"""What trainers and schedulers of others are tried with, and the plain loop that they are held to.

Models are made from configurations, so that nothing is downloaded. The frameworks are imported
where they are used, because that takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import engine
import problems
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import steepest

OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-2, "weight_decay": 0.1},
    "muon": {"lr": 0.02, "adam_lr": 1e-2, "ns_dtype": "float32"},
    "schedulefree_adamw": {"lr": 1e-2},
}
STEPS, MIDDLE = 6, 3


def make(name: str, model: nn.Module, **options: Any) -> steepest.Optimizer:
    return steepest.create(name, model, **{**OPTIONS[name], **options})


def decline(optimizer: Any) -> lr_scheduler.LambdaLR:
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def moved_alike(ours: Sequence[Tensor], theirs: Sequence[Tensor], start: Sequence[Tensor]) -> None:
    for a, b, p0 in zip(ours, theirs, start, strict=True):
        assert (b - p0).norm() > 0
        engine.moved_alike(a, b, p0, 1e-5)


# Every framework trains the same tiny LLaMA of Hugging Face on the same sequences.


def sequences() -> list[dict[str, Tensor]]:
    batches = problems.batches(count=2 * STEPS, rows=4)
    rows = [row for tokens, _ in batches for row in tokens]
    return [{"input_ids": row, "labels": row} for row in rows]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def loop(
    name: str,
    batches: Iterable[dict[str, Tensor]],
    *,
    clip: float | None = None,
    accumulate: int = 1,
    autocast: bool = False,
) -> Any:
    """Return the model that a plain loop trains."""
    model = llama()
    optimizer = make(name, model)
    scheduler = decline(optimizer)
    for count, batch in enumerate(batches, start=1):
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
            loss = model(**batch).loss
        (loss / accumulate).backward()
        if count % accumulate:
            continue
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model
