"""Benchmark every operation beside its peers: `python -m benchmarks` of a clone of the repository.

nsa-plugin bench --config benchmarks/configs/mla_decode.yaml
nsa-plugin bench compare before.json after.json
"""

from __future__ import annotations

import argparse
import os
import sys

from nsa_backend_plugin.commands import _checkout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.prefix_chars = "\0"  # every word, --help too, belongs to the suite
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(options: argparse.Namespace) -> int:
    """Becomes the suite's process; returns only where there is no suite."""
    try:
        root = _checkout.find("benchmarks").parent
    except FileNotFoundError as error:
        print(f"nsa-plugin bench: {error}", file=sys.stderr)
        return 2
    paths = (str(root), str(root / "src"), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *options.arguments], environment)
