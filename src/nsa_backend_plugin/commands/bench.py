"""Benchmark every operation beside its peers: `python -m benchmarks` of a clone of the repository.

nsa-plugin bench --config benchmarks/configs/mla_decode.yaml
nsa-plugin bench compare before.json after.json
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def _clone() -> Path | None:
    """The clone that this package is installed from in place, else the one that the user stands in."""
    for root in (Path(__file__).resolve().parents[3], Path.cwd()):
        if (root / "src" / "nsa_backend_plugin").is_dir() and (root / "benchmarks" / "__main__.py").is_file():
            return root
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.prefix_chars = "\0"  # every word, --help too, belongs to the suite
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(options: argparse.Namespace) -> int:
    """Becomes the suite's process; returns only where there is no suite."""
    root = _clone()
    if root is None:
        print(
            "nsa-plugin bench: the benchmark suite is not part of the installed package; run this in a clone of the "
            "repository, or install the clone with python -m pip install -e",
            file=sys.stderr,
        )
        return 2
    paths = (str(root), str(root / "src"), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *options.arguments], environment)
