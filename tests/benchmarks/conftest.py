"""The suite is a folder of scripts, not a package: make its modules importable."""

import sys
from pathlib import Path

SUITE = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(SUITE))
