from __future__ import annotations

import fake_race
import pytest

from steepest.study.store import Race, load_race


@pytest.fixture(scope="session")
def race(tmp_path_factory) -> Race:
    """The fake race; tests must not change its files."""
    return load_race(fake_race.build(tmp_path_factory.mktemp("race")))
