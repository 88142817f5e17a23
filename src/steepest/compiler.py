"""Whether torch.compile can work here: it needs a C++ compiler, Python's headers and OpenMP."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig


def problem() -> str:
    """Return a sentence that says what is missing, empty if nothing is.

    The compiler looked for is the one that torch takes: $CXX, else clang++ on macOS and g++
    elsewhere.
    """
    return _problem_of(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


@functools.cache
def _problem_of(name: str) -> str:
    compiler = shutil.which(name)
    if compiler is None:
        return f"No C++ compiler ({name}) was found."
    # Apple's compiler comes without OpenMP, and torch does without it there.
    flags = [] if sys.platform == "darwin" else ["-fopenmp", "-include", "omp.h"]
    flags.append(f"-I{sysconfig.get_path('include')}")
    done = subprocess.run(
        [compiler, *flags, "-fsyntax-only", "-x", "c++", "-"],
        input="#include <Python.h>\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    return f"The C++ compiler {name} does not work ({(lines or ['no reason given'])[0].strip()})."
