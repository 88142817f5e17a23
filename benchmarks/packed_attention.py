"""Time and memory of attention over packed documents, against a mask of all pairs of tokens.

    python benchmarks/packed_attention.py [--lengths 1024 8192] [--documents 1 512] [--threads 2]

One row of each length, of documents of random lengths with the given mean, goes forward and
backward through a LLaMA of one layer in float32 (bfloat16 on a GPU). Every cell is a process of its
own: the best of --rounds passes after a first one, and the most memory that the process had beyond
what it had before. At 32,768 tokens the mask takes 8 GB on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from steepest.models import Llama, LlamaConfig, attention


def peak(device: str) -> int:
    """Return the most bytes that this process had at a time, on a GPU those of tensors there."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    # Not of getrusage, where a process begins with what its parent had.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def cell(args: argparse.Namespace, kernel: str, length: int, mean: int) -> dict[str, float]:
    """Return the seconds of one pass by a kernel and the bytes it needs."""
    torch.set_num_threads(args.threads)
    attention.kernel = lambda *_: kernel
    config = LlamaConfig(
        vocab_size=512, hidden_size=args.heads * 64, heads=args.heads, layers=1,
        max_sequence_length=length,
    )  # fmt: skip
    model = Llama(config).to(args.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(512, (1, length), generator=generator).to(args.device)
    borders = torch.rand(1, length, generator=generator) < 1 / mean
    documents = borders.cumsum(1).int().to(args.device)
    seconds, before = [], peak(args.device)
    for _ in range(1 + args.rounds):
        began = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            loss = model.objective(tokens, tokens, documents).objective
        loss.backward()
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"seconds": min(seconds[1:]), "bytes": peak(args.device) - before}


def in_process(argv: list[str], *place: object) -> dict[str, float]:
    """Return `cell` of a process of its own."""
    command = [sys.executable, __file__, *argv, "--cell", *map(str, place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 4096, 8192])
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--heads", type=int, default=4, help="of 64 channels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        kernel, length, mean = args.cell
        print(json.dumps(cell(args, kernel, int(length), int(mean))))
        return
    fast = "document" if args.device == "cpu" else "flex"
    table = Table(
        "tokens", "mean document", "mask s", f"{fast} s", "ratio", "mask MB", f"{fast} MB"
    )
    for length in args.lengths:
        for mean in args.documents:
            mask, ours = (in_process(sys.argv[1:], k, length, mean) for k in ("dense", fast))
            ratio = mask["seconds"] / ours["seconds"]
            table.add_row(
                f"{length:,}", f"{mean:,}", f"{mask['seconds']:.3f}", f"{ours['seconds']:.3f}",
                f"{ratio:.2f}", f"{mask['bytes'] / 1e6:,.0f}", f"{ours['bytes'] / 1e6:,.0f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
