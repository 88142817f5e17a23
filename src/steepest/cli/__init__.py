"""The command line: one sub-command per verb.

A sub-command is a frozen dataclass of its arguments, whose fields are its flags and whose field
docstrings are its help, and a function that does it.
"""

import sys

try:
    import rich  # noqa: F401
    import tyro  # noqa: F401
except ImportError as error:
    sys.exit(f"steepest: the command line needs {error.name}; pip install 'steepest[bench]'.")

from steepest.cli.commands import main

__all__ = ["main"]
