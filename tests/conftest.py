"""One thread, and the errors that the fidelity tests measured: printed, or kept for the docs."""

from __future__ import annotations

import os

# NumPy's BLAS reads it once, when it is first imported. Its threads spin while they wait: with as
# many test processes as cores a small eigenvalue problem takes minutes.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path

import measured
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag that keeps measured errors."""
    parser.addoption(
        "--write-fidelity",
        type=Path,
        metavar="FILE",
        help="write the errors that the fidelity tests measured to this JSON file",
    )


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """With -v, print the largest relative displacement error of each optimizer and comparison."""
    if measured.ERRORS and config.get_verbosity() > 0:
        terminalreporter.section("fidelity: largest ||(p - p0) - (q - q0)|| / ||q - q0||")
        for line in measured.table():
            terminalreporter.write_line(line)
    if (path := config.getoption("--write-fidelity")) is not None:
        if exitstatus != 0:
            raise pytest.UsageError("Errors of failed comparisons are not kept.")
        measured.write(path)
