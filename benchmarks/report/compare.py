"""Compare two results files: ratio per row, and whether it is more than noise.

python -m benchmarks compare before.json after.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import BenchmarkResult, ResultsFormatter, describe, load_json
from benchmarks.report.screen import Line, console, print_table
from benchmarks.workloads import workload

#: Differences below this are never called faster or slower: clocks and temperatures move by as much between runs.
LEAST_NOISE = 0.03


@dataclass(frozen=True)
class Comparison:
    """One row of both files. ratio: after over before; noise: relative difference that means nothing."""

    row: BenchmarkResult
    before_us: float | None
    after_us: float | None
    ratio: float | None
    noise: float
    verdict: str


def noise_of(before: BenchmarkResult, after: BenchmarkResult) -> float:
    """The spreads of both rows together, and at least LEAST_NOISE."""
    return max(LEAST_NOISE, (before.spread or 0.0) + (after.spread or 0.0))


def compare(before: Sequence[BenchmarkResult], after: Sequence[BenchmarkResult]) -> list[Comparison]:
    """Rows of `after` against the same rows of `before`; rows that only one file has are listed as such."""
    earlier = {_key(row): row for row in before}
    result = [_pair(earlier.pop(_key(row), None), row) for row in after]
    gone = [Comparison(row, row.median_us, None, None, 0.0, "only in the first") for row in earlier.values()]
    return result + gone


def _key(row: BenchmarkResult) -> str:
    return json.dumps([row.workload, workload(row.workload).complete(row.params), row.backend], sort_keys=True)


def _pair(before: BenchmarkResult | None, after: BenchmarkResult) -> Comparison:
    if before is None:
        return Comparison(after, None, after.median_us, None, 0.0, "only in the second")
    if not before.median_us or not after.median_us:
        same = before.status == after.status
        verdict = after.status if same else f"{before.status} -> {after.status}"
        return Comparison(after, before.median_us, after.median_us, None, 0.0, verdict)
    ratio, noise = after.median_us / before.median_us, noise_of(before, after)
    if ratio > 1 + noise:
        verdict = "slower"
    elif ratio < 1 / (1 + noise):
        verdict = "faster"
    else:
        verdict = "same within noise"
    return Comparison(after, before.median_us, after.median_us, ratio, noise, verdict)


COLUMNS = ("before us", "after us", "ratio", "noise", "verdict")


def groups(comparisons: Sequence[Comparison]) -> list[tuple[str, list[Line]]]:
    """A heading per case, a line per backend."""
    found: dict[str, list[Line]] = {}
    for c in comparisons:
        cells = (
            "" if c.before_us is None else f"{c.before_us:.2f}",
            "" if c.after_us is None else f"{c.after_us:.2f}",
            "" if c.ratio is None else f"{c.ratio:.3f}",
            f"{100 * c.noise:.0f}%" if c.noise else "",
            c.verdict,
        )
        found.setdefault(f"{c.row.workload} {describe(c.row)}", []).append(Line(c.row.backend, cells))
    return list(found.items())


def differences(before: ResultsFormatter, after: ResultsFormatter) -> list[str]:
    """What the two environments differ in; a comparison across devices is a comparison of devices."""
    keys = ("device", "driver", "libraries", "commit", "sources")
    return [
        f"{k}: {before.environment.get(k)} -> {after.environment.get(k)}"
        for k in keys
        if before.environment.get(k) != after.environment.get(k)
    ]


def compare_files(before_path: Path, after_path: Path) -> int:
    """Print the comparison. Exit code 1 when a row is slower or has lost its result, else 0."""
    (first, before), (second, after) = load_json(before_path), load_json(after_path)
    for line in differences(first, second):
        print(line)
    comparisons = compare(before, after)
    print_table(console(), COLUMNS, groups(comparisons))
    counts = {v: sum(c.verdict == v for c in comparisons) for v in ("faster", "slower", "same within noise")}
    print(", ".join(f"{n} {v}" for v, n in counts.items()))
    return 1 if any(c.verdict == "slower" or c.verdict.startswith("ok ->") for c in comparisons) else 0


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    options = parser.parse_args(words)
    try:
        return compare_files(options.before, options.after)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"benchmarks compare: error: not a results file: {error}", file=sys.stderr)
        return 2
