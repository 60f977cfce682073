from pathlib import Path

SUITE = Path(__file__).resolve().parents[2] / "benchmarks"
