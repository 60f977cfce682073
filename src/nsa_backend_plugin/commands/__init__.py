"""Subcommands of `nsa-plugin`, one file each; see `cli.py` for what a file defines."""
