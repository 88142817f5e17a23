"""The generated pages of the documentation are those that the package would write now."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

import steepest
from steepest.optim import catalogue
from steepest.optim.fidelity import fidelity
from steepest.report import optimizers, pages

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizers.md", "fidelity.md"])
def test_pages_are_current(name: str) -> None:
    page = {"optimizers.md": pages.optimizers_page, "fidelity.md": pages.fidelity_page}[name]
    assert (DOCS / name).read_text(encoding="utf-8") == page(), "run tools/make_docs.py"


@pytest.mark.parametrize("table", [0, 1], ids=["float32", "bfloat16"])
def test_the_page_of_memory_is_current(table: int) -> None:
    # A size of every optimizer in turn: all take a minute and a half.
    dtype, state_dtype = [(torch.float32, None), (torch.bfloat16, torch.bfloat16)][table]
    text = (DOCS / "memory.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    for number, name in enumerate(steepest.names()):
        found = [row for row in rows if row and row[0] == name]
        assert len(found) == 2
        place = (number + table) % len(pages.SIZES)
        expected = pages._gigabytes(name, pages.SIZES[place], dtype, state_dtype)
        assert found[table][1 + place] == expected, (name, "run tools/make_docs.py")


@pytest.mark.parametrize("name", steepest.names())
def test_every_optimizer_was_measured_in_both_precisions(name: str) -> None:
    against_paper = [c for c in fidelity(name) if not c.package]
    assert {c.comparison.partition(",")[0] for c in against_paper} >= {"float32", "float64"}
    for comparison in fidelity(name):
        limit = 5e-2 if comparison.comparison.startswith("bfloat16") else 1e-5
        assert comparison.error <= limit or comparison.note


@pytest.mark.parametrize("name", catalogue.WRAPPERS)
def test_a_wrapper_in_detail_says_what_its_hyperparameters_mean(name: str) -> None:
    console = Console(width=1000, record=True, file=io.StringIO())
    for part in optimizers.detail(name):
        console.print(part)
    text = console.export_text()
    assert f"wrap=['{name}']" in text
    for key, (_, meaning) in catalogue.describe_wrapper(name).hyperparameters.items():
        assert key in text
        assert meaning in text
