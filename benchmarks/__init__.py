"""The attention benchmark suite: `python -m benchmarks` from the root of a clone."""
