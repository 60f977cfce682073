"""Benchmark every operation beside its peers: the same command as benchmarks/benchmark.py of a source checkout.

nsa-plugin bench --config benchmarks/configs/mla_decode.yaml
nsa-plugin bench compare before.json after.json
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

_SUITE = Path(__file__).resolve().parents[3] / "benchmarks"


def _suite() -> ModuleType | None:
    """The suite's command line, or None in an installation without a checkout. Imports neither torch nor kernels."""
    if not (_SUITE / "benchmark.py").is_file():
        return None
    if str(_SUITE) not in sys.path:
        sys.path.insert(0, str(_SUITE))
    return importlib.import_module("benchmark")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suite = _suite()
    if suite is not None:
        suite.add_arguments(parser)
        return
    parser.prefix_chars = "\0"  # take options as they are: `run` explains what is missing
    parser.add_argument("arguments", nargs="*")


def run(options: argparse.Namespace) -> int:
    suite = _suite()
    if suite is None:
        print(
            "nsa-plugin bench: the benchmark suite is not part of the installed package; it runs from a source "
            "checkout (pip install -e .)",
            file=sys.stderr,
        )
        return 2
    return suite.run(options)
