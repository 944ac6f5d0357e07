"""`python -m memory3`: the command line."""

from memory3.cli import main

main()
