"""Write docs/optimizers.md, docs/fidelity.md and docs/memory.md from what the package knows.

    python -m pytest tests/fidelity --write-fidelity src/steepest/optim/fidelity.json
    python tools/make_docs.py

The first command measures the errors of every optimizer anew (a few minutes), the second writes the
pages. A test compares the pages with what this would write.
"""

from __future__ import annotations

from pathlib import Path

from steepest.report import pages

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    """Write every page."""
    for name, text in pages.all_pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(DOCS / name)


if __name__ == "__main__":
    main()
