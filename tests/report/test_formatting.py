from __future__ import annotations

import pytest

from steepest.analysis import Estimate
from steepest.report import formatting


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (3.34159, 0.0123, "3.342 ± 0.012"),
        (3.34159, 0.0323, "3.34 ± 0.03"),
        (3.34159, 0.2, "3.34 ± 0.20"),
        (3.34159, 0.7, "3.3 ± 0.7"),
        (3.34159, 4.0, "3.3 ± 4.0"),
        (3.34159, 1e-7, "3.3416 ± 0.0000"),
        (3.34159, 0.0, "3.3416 ± 0.0000"),
        (3.34159, None, "3.342 ± ?"),
    ],
)
def test_means_are_rounded_by_their_uncertainty(mean, half, text):
    assert " ".join(formatting.estimate(Estimate(mean, half, 3))) == text


def test_differences_have_a_sign():
    assert formatting.estimate(Estimate(-0.0811, 0.012, 3), sign=True)[0] == "−0.081"
    assert formatting.estimate(Estimate(0.0811, 0.012, 3), sign=True)[0] == "+0.081"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (614.2, "614"), (999.7, "1.00 k"), (61_440, "61.4 k"), (999_999, "1,000 k"),
     (1_228_800, "1.23 M"), (2e10, "20.0 B")],
)  # fmt: skip
def test_counts(value, text):
    assert formatting.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234"), (24.04, "24.0"), (9.996, "10.0"), (0.01234, "0.0123"), (0.0, "0")],
)
def test_significant_digits(value, text):
    assert formatting.significant(value) == text


def test_durations():
    shown = [formatting.duration(s) for s in (0.04, 16, 190, 9000)]
    assert shown == ["0.0 s", "16.0 s", "3.2 min", "2.5 h"]
