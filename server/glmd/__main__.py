"""Entry point of `python -m glmd`."""

from glmd.cli.main import main

main()
