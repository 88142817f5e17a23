"""The generated pages of the documentation are those that the package would write now."""

from __future__ import annotations

from pathlib import Path

import pytest

import steepest
from steepest.optim.fidelity import fidelity
from steepest.report import pages

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizers.md", "fidelity.md", "memory.md"])
def test_pages_are_current(name: str) -> None:
    page = {
        "optimizers.md": pages.optimizers_page,
        "fidelity.md": pages.fidelity_page,
        "memory.md": pages.memory_page,
    }[name]
    assert (DOCS / name).read_text(encoding="utf-8") == page(), "run tools/make_docs.py"


@pytest.mark.parametrize("name", steepest.names())
def test_every_optimizer_was_measured_in_both_precisions(name: str) -> None:
    against_paper = [c for c in fidelity(name) if not c.package]
    assert {c.comparison.partition(",")[0] for c in against_paper} >= {"float32", "float64"}
    for comparison in fidelity(name):
        limit = 5e-2 if comparison.comparison.startswith("bfloat16") else 1e-5
        assert comparison.error <= limit or comparison.note
