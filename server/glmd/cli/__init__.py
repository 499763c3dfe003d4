"""The `glmd` command."""
