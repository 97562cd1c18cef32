"""``python -m biosae``: the command line."""

from biosae.cli import main

main()
