"""`python -m steepest` and `torchrun -m steepest`: the command line."""

from steepest.cli import main

main()
