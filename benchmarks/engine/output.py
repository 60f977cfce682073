"""Results files of the engine's measurements: environment, options and rows, the machine's name in the file's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.cli import default_device
from benchmarks.common import write
from benchmarks.run.environment import RESULTS, collect, machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=RESULTS / "engine", help="folder of results and logs")
    parser.add_argument("--label", default="", help="put into the name of the results file")
    parser.add_argument("--force", action="store_true", help="replace a results file that exists")


def prepare(options: argparse.Namespace, *names: str) -> Path:
    """The results file of a measurement. Makes its folder. Raises ValueError where the file exists, unless forced."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("-".join(filter(None, (*names, options.label, machine(device())))) + ".json")
    if path.exists() and not options.force:
        raise ValueError(f"{path}: exists; --force replaces it")
    return path


def save(path: Path, options: argparse.Namespace, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write all rows so far, and more under its names.

    The file that is there is this run's own, or `prepare` would have refused.
    """
    setting = {k: v for k, v in vars(options).items() if isinstance(v, (str, int, float, list))}
    content = {
        "environment": collect(device()),
        "options": setting,
        "rows": rows,
        **more,
    }
    write(path, json.dumps(content, indent=1) + "\n", force=True)


def device() -> str:
    return default_device(argparse.Namespace(device=None))
