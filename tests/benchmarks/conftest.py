from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cli

SUITE = Path(__file__).resolve().parents[2] / "benchmarks"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "measures: runs the clock")


def code(*words: str) -> int:
    """Exit code of the command; argparse leaves by an exception."""
    try:
        return cli.main(words)
    except SystemExit as left:
        return left.code
