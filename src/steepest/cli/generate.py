"""`steepest generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tyro.conf import Positional

from steepest.cli.arguments import parse
from steepest.errors import UserError
from steepest.models.generation import generate
from steepest.train import trained


@dataclass(frozen=True)
class Generate:
    """Continue a text with a trained model."""

    checkpoint: Positional[Path]
    """File of a checkpoint, or folder of a run, of which the newest is taken."""
    prompt: str
    """Text to continue."""
    tokens: int = 64
    """Tokens to add; fewer if the model ends the document before."""
    temperature: float = 0.8
    """What logits are divided by before a token is drawn; 0 takes the most probable one."""
    top_k: int | None = None
    """Draw from so many of the most probable tokens."""
    top_p: float | None = None
    """Draw from the most probable tokens that together have this probability."""
    seed: int = 0
    """Of the draws."""


def generate_text(arguments: list[str]) -> None:
    """Print the prompt and what follows it.

    The model sees as many tokens at a time as it was trained on, with the weights that its run
    evaluates.
    """
    args: Generate = parse(Generate, "generate", arguments)
    model = trained.read(args.checkpoint)
    data = model.config.data
    tokenizer = trained.open_tokenizer(data)
    (prompt,) = tokenizer.encode_batch([args.prompt])
    if not len(prompt):
        raise UserError("--prompt must not be empty.")
    (ids,) = generate(
        model.model(),
        torch.from_numpy(prompt.astype(np.int64))[None],
        args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        end=tokenizer.end,
        window=data.sequence_length,
        generator=torch.Generator().manual_seed(args.seed),
    ).tolist()
    # A model may have more ids than its tokenizer has texts.
    print(tokenizer.decode([i for i in ids if i < tokenizer.vocab_size and i != tokenizer.end]))
