"""Compiled optimizers: see `inductor.FILES` for which."""

from __future__ import annotations

import pytest
from inductor import assert_compiled_is_eager, names


@pytest.mark.slow
@pytest.mark.parametrize("name", names(__name__))
def test_compiled_is_eager(name: str) -> None:
    assert_compiled_is_eager(name)
