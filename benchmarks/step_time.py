"""Time of one optimizer step on the parameters of a LLaMA-60M, against its floor and torch's own.

    python benchmarks/step_time.py [--threads 2] [--rounds 20] [--json out.json]

Parameters and gradients are random float32, on the CPU unless --device says otherwise; about 8 GB
of memory is needed. The floor of an elementwise rule is the bytes it must move at the bandwidth
measured in the same run by an in-place add; the floor of Muon is the time of its matrix products
alone, in bfloat16 on matrices of the same shapes, in the same run. All arms are timed in turn in
every round, so that a busy machine slows them alike; a table cell is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import steepest

HIDDEN, LAYERS, INTERMEDIATE, VOCABULARY = 512, 8, 1376, 32_000
MATRICES = (
    [(HIDDEN, HIDDEN)] * 4 * LAYERS
    + [(INTERMEDIATE, HIDDEN)] * 2 * LAYERS
    + [(HIDDEN, INTERMEDIATE)] * LAYERS
)
TABLES = [(VOCABULARY, HIDDEN)] * 2
VECTORS = [(HIDDEN,)] * (2 * LAYERS + 1)
BYTES = {"adamw": 28, "lion": 20, "signum": 20, "sgd": 20}
"""Bytes per float32 parameter: gradient, parameter and state read, parameter and state written."""

Arm = Callable[[], object]


def tensors(shapes: list[tuple[int, ...]], device: str) -> list[nn.Parameter]:
    """Return parameters of these shapes with gradients."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, generator=generator, device=device) * 0.02)
        p.grad = torch.randn(shape, generator=generator, device=device) * 1e-3
        params.append(p)
    return params


def steepest_arm(name: str, device: str, compile: bool) -> Arm:
    """Return a step of one of our optimizers over the whole parameter set."""
    groups = [
        {"params": tensors(MATRICES, device), "role": "hidden"},
        {"params": tensors(TABLES, device), "role": "embedding"},
        {"params": tensors(VECTORS, device), "role": "vector"},
    ]
    return steepest.create(name, groups, weight_decay=0.1, compile=compile).step


def torch_muon(device: str) -> Arm:
    """Return torch.optim.Muon on the matrices and fused AdamW on the rest."""
    muon = torch.optim.Muon(tensors(MATRICES, device), lr=0.02)
    adamw = torch.optim.AdamW(tensors(TABLES + VECTORS, device), fused=True)

    def step() -> None:
        muon.step()
        adamw.step()

    return step


def products(device: str) -> Arm:
    """Return the matrix products of five Newton-Schulz steps on every matrix, and nothing else."""
    stacks = []
    for shape in sorted(set(MATRICES)):
        rows, columns = min(shape), max(shape)
        count = MATRICES.count(shape)
        x = torch.randn(count, rows, columns, device=device, dtype=torch.bfloat16) / columns**0.5
        square = torch.empty(count, rows, rows, device=device, dtype=torch.bfloat16)
        stacks.append((x, square, torch.empty_like(square), torch.empty_like(x)))

    def run() -> None:
        for x, gram, square, out in stacks:
            for _ in range(5):
                torch.bmm(x, x.mT, out=gram)
                torch.bmm(gram, gram, out=square)
                torch.bmm(square, x, out=out)

    return run


def bandwidth_arm(device: str, numel: int) -> Arm:
    """Return an in-place add over as many elements as there are parameters: 12 bytes each."""
    a, b = torch.randn(numel, device=device), torch.randn(numel, device=device)
    return lambda: a.add_(b)


def timed(arms: dict[str, Arm], rounds: int, device: str) -> dict[str, float]:
    """Return the median milliseconds of each arm over rounds in which all arms take turns."""
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times: dict[str, list[float]] = {name: [] for name in arms}
    for name, arm in arms.items():
        began = time.perf_counter()
        arm()
        arm()
        print(f"  {name}: first two steps {time.perf_counter() - began:.1f} s", file=sys.stderr)
    for _ in range(rounds):
        for name, arm in arms.items():
            synchronize()
            began = time.perf_counter()
            arm()
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(device: str, rounds: int) -> list[dict[str, object]]:
    """Return one row per arm: milliseconds, its floor, and the torch arm it is held against."""
    numel = sum(p.numel() for p in map(torch.empty, MATRICES + TABLES + VECTORS))
    everything = MATRICES + TABLES + VECTORS
    arms: dict[str, Arm] = {"in-place add": bandwidth_arm(device, numel)}
    for name in BYTES:
        arms[f"steepest {name}"] = steepest_arm(name, device, compile=True)
    arms["steepest adamw, eager"] = steepest_arm("adamw", device, compile=False)
    arms["torch fused AdamW"] = torch.optim.AdamW(tensors(everything, device), fused=True).step
    arms["torch fused SGD"] = torch.optim.SGD(
        tensors(everything, device), lr=0.1, momentum=0.9, fused=True
    ).step
    elementwise = timed(arms, rounds, device)
    arms.clear()  # several GB that the next arms need
    arms = {
        "products": products(device),
        "steepest muon": steepest_arm("muon", device, compile=True),
        "steepest muon, eager": steepest_arm("muon", device, compile=False),
        "torch Muon + fused AdamW": torch_muon(device),
    }
    matrices = timed(arms, max(5, rounds // 2), device)
    ms_per_byte = elementwise["in-place add"] / (12 * numel)
    rest = sum(torch.empty(s).numel() for s in TABLES + VECTORS)
    muon_floor = matrices["products"]
    rows = []
    for name, ms in (elementwise | matrices).items():
        key = name.split(",")[0].rpartition(" ")[2].lower()
        floor = muon_floor if "uon" in name else BYTES.get(key, 0) * numel * ms_per_byte
        rows.append({"arm": name, "ms": ms, "floor_ms": floor or None})
    rows.append({"arm": "28 bytes x other parameters", "ms": 28 * rest * ms_per_byte})
    return rows


def show(rows: list[dict[str, object]]) -> None:
    """Print the rows as a table."""
    table = Table("arm", "ms", "floor ms", "x floor")
    for row in rows:
        ms, floor = float(str(row["ms"])), row.get("floor_ms")
        ratio = f"{ms / float(str(floor)):.2f}" if floor else ""
        table.add_row(str(row["arm"]), f"{ms:.1f}", f"{floor:.1f}" if floor else "", ratio)
    Console().print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(args.device, args.rounds)
    show(rows)
    if args.json:
        machine = {"torch": torch.__version__, "cpu": platform.processor(), "threads": args.threads}
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
