"""Compiled wrappers, each around AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from inductor import FILES, assert_compiled_is_eager

from steepest.optim import catalogue

# They do nothing to float32; test_compiled.py compares them in bfloat16, to the bit.
ROUNDING = {"stochastic_rounding", "kahan"}
OPTIONS: dict[str, dict[str, Any]] = {"lookahead": {"update_interval": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [w for w in catalogue.WRAPPERS if w not in ROUNDING])
def test_compiled_is_eager(wrap: str) -> None:
    assert_compiled_is_eager("adamw", wrap=(wrap,), **OPTIONS.get(wrap, {}))


def test_every_family_is_compiled() -> None:
    families = sorted(family for group in FILES.values() for family in group)
    assert families == sorted({recipe.family for recipe in catalogue.RECIPES.values()})
    assert all(Path(__file__).with_name(f"{name}.py").exists() for name in FILES)
