"""The command line: one sub-command per verb.

A sub-command is a frozen dataclass of its arguments, whose fields are its flags and whose field
docstrings are its help, and a function that does it. The module of a sub-command is imported when
it is asked for, so that the others do not wait for what it needs.
"""

from steepest.cli.commands import main

__all__ = ["main"]
