"""One thread, and the table of measured errors at the end of a verbose run."""

from __future__ import annotations

from collections.abc import Iterator

import measured
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """With -v, print the largest relative displacement error of each optimizer and comparison."""
    if measured.ERRORS and config.get_verbosity() > 0:
        terminalreporter.section("fidelity: largest ||(p - p0) - (q - q0)|| / ||q - q0||")
        for line in measured.table():
            terminalreporter.write_line(line)
