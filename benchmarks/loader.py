"""Tokens per second of the loader, from shards on disk, against what training a LLaMA-60M consumes.

    python benchmarks/loader.py [--threads 2] [--seconds 2] [--tokens 20M] [--json out.json]

The shards are of made-up documents with a log-normal length (median 400 tokens), so they are in the
page cache, as those of a real corpus are once the operating system has read ahead. Each packing is
timed as it is used: batches by steps in the training order, on one thread beside nothing else; then
the same through the prefetching thread. Training is forward and backward passes of float32 without
an optimizer step, in batches of 4 x 256: an optimizer makes the ratios larger.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from steepest import models
from steepest.cli.data import count
from steepest.data import Loader, Packing, TokenSplit, open_tokens
from steepest.data.prefetch import Prefetcher
from steepest.data.preparation import prepare
from steepest.data.symbols import ByteTokenizer

ARMS = {
    "contiguous 4 x 256": (Packing(), 4, 256),
    "contiguous 512 x 256": (Packing(), 512, 256),
    "documents 4 x 256": (Packing("documents"), 4, 256),
    "documents 512 x 256": (Packing("documents"), 512, 256),
    "documents of 4,096, 16 x 32,768": (Packing("documents", 4096), 16, 32_768),
    "rows 4 x 256": (Packing("rows"), 4, 256),
    "rows 512 x 256": (Packing("rows"), 512, 256),
}
"""Packing, rows of a batch, tokens of a row. Padding counts as tokens: a model computes it, too."""


class MadeUp:
    """A source of random documents without end."""

    name, licence, fingerprint = "made up", "CC0", "made up"
    description, own_validation = "Random letters", False

    def read(self, split: str, state: dict[str, Any] | None = None) -> MadeUp:
        self.random = np.random.default_rng(0)
        self.letters = self.random.integers(97, 123, 2**20, dtype=np.uint8).tobytes().decode()
        return self

    def __iter__(self) -> MadeUp:
        return self

    def __next__(self) -> str:
        length = min(int(self.random.lognormal(np.log(400), 1.2)) + 1, 50_000)
        start = int(self.random.integers(len(self.letters) - length))
        return self.letters[start : start + length]

    def state(self) -> dict[str, Any]:
        return {}


def rate(work: Callable[[], int], seconds: float) -> float:
    """Return the median tokens per second of `work`, which returns how many it did."""
    work()
    rates, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds or len(rates) < 3:
        start = time.perf_counter()
        rates.append(work() / (time.perf_counter() - start))
    return float(np.median(rates))


def loading(split: TokenSplit, arm: str, seconds: float) -> tuple[float, float]:
    """Return the rate of a loader alone, and through the prefetching thread."""
    packing, batch_size, length = ARMS[arm]
    loader = Loader(split, batch_size, length, seed=0, packing=packing)
    steps = itertools.count()
    repeats = max(1, 2**17 // (batch_size * length))

    def alone() -> int:
        return sum(loader.rows(next(steps)).tokens.numel() for _ in range(repeats))

    direct = rate(alone, seconds)
    with Prefetcher(loader.rows, itertools.count(), torch.device("cpu")) as batches:
        ahead = rate(lambda: sum(next(batches).tokens.numel() for _ in range(repeats)), seconds)
    return direct, ahead


def training(split: TokenSplit, seconds: float) -> float:
    """Return the rate of forward and backward passes of a LLaMA-60M."""
    config = models.size("llama-60m")
    model = models.Llama(config)
    loader = Loader(split, 4, 256, seed=0)
    steps = itertools.count()

    def work() -> int:
        batch = loader.rows(next(steps))
        model.zero_grad()
        model.loss(batch.tokens, batch.targets).backward()
        return batch.tokens.numel()

    return rate(work, seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--tokens", default="20M")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "corpus"
        tokens = count("--tokens", args.tokens)
        prepare(MadeUp(), ByteTokenizer(), folder, tokens=tokens, shard_tokens=tokens // 8)
        split = open_tokens(folder).train
        trained = training(split, 5 * args.seconds)
        rows = [
            {"arm": arm, "direct": direct, "ahead": ahead}
            for arm in ARMS
            for direct, ahead in [loading(split, arm, args.seconds)]
        ]
    table = Table("batches", "M tokens/s", "through the thread", "x training", box=None)
    for row in rows:
        direct, ahead = float(row["direct"]), float(row["ahead"])
        slower = min(direct, ahead)
        table.add_row(
            str(row["arm"]), f"{direct / 1e6:.1f}", f"{ahead / 1e6:.1f}", f"{slower / trained:,.0f}"
        )
    console = Console()
    console.print(table)
    console.print(f"Training a LLaMA-60M: {trained:,.0f} tokens/s on {args.threads} threads")
    if args.json:
        machine = {"torch": torch.__version__, "cpu": platform.processor(), "threads": args.threads}
        content = {"machine": machine, "training": trained, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
