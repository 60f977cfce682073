"""The command by its file's name, from any folder: `python benchmark.py ...` is `python -m benchmarks ...`."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
paths = (str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH"))
environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], environment)
