"""`python -m glmd` is `glmd`."""

from glmd.cli.main import main

main()
