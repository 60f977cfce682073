"""Benchmark every operation beside its peers: `python -m benchmarks` of a source checkout.

nsa-plugin bench --config benchmarks/configs/mla_decode.yaml
nsa-plugin bench compare before.json after.json
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def _suite() -> ModuleType | None:
    """The suite's command line: of the checkout that this package is installed from in place, or of the one that the
    user stands in; None without a checkout. Imports neither torch nor kernels."""
    for root in (Path(__file__).resolve().parents[3], Path.cwd()):
        package = root / "benchmarks" / "__init__.py"
        if (root / "src" / "nsa_backend_plugin").is_dir() and package.is_file():
            if "benchmarks" not in sys.modules:
                spec = importlib.util.spec_from_file_location("benchmarks", package)
                assert spec is not None
                assert spec.loader is not None
                sys.modules["benchmarks"] = module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            return importlib.import_module("benchmarks.cli")
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.prefix_chars = "\0"  # every word, --help too, belongs to the suite
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(options: argparse.Namespace) -> int:
    suite = _suite()
    if suite is None:
        print(
            "nsa-plugin bench: the benchmark suite is not part of the installed package; run it in a clone of the "
            "repository, or install that clone with pip install -e",
            file=sys.stderr,
        )
        return 2
    return suite.main(options.arguments)
