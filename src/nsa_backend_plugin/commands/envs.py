"""Print ENVS.md: every environment variable of the plugin."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "nsa-plugin envs > ENVS.md"


def run(options: argparse.Namespace) -> int:
    from nsa_backend_plugin import settings

    print(settings.markdown(), end="")
    return 0
