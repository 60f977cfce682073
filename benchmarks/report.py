"""Generate benchmarks/RESULTS.md from the results files: targets, wins and losses, floors.

python benchmarks/report.py [--results benchmarks/results] [--out benchmarks/RESULTS.md]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent / "src"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from backends import DEFAULT, OWN, is_peer  # noqa: E402
from common import BenchmarkResult, ResultsFormatter, describe, job_key, label, load_json  # noqa: E402
from crossover import crossovers  # noqa: E402

#: Closer than this is a tie.
TIE = 0.03
NOTES = HERE / "RESULTS.notes.md"


def jobs(results: Sequence[BenchmarkResult]) -> dict[str, list[BenchmarkResult]]:
    """Rows by what they do, whatever the cache format."""
    groups: dict[str, list[BenchmarkResult]] = {}
    for row in results:
        groups.setdefault(job_key(row), []).append(row)
    return groups


def fastest(rows: Sequence[BenchmarkResult], peers: bool) -> BenchmarkResult | None:
    """The fastest of our own implementations, or of the peers."""
    timed = [r for r in rows if r.median_us and (is_peer(r.backend) if peers else r.backend in OWN)]
    return min(timed, key=lambda r: r.median_us or 0.0, default=None)


def _same_case(rows: Sequence[BenchmarkResult], row: BenchmarkResult) -> list[BenchmarkResult]:
    return [r for r in rows if r.workload == row.workload and r.params == row.params]


def target_table(results: Sequence[BenchmarkResult]) -> list[str]:
    """One line per case that has a target: ours, what the registry picks, the best peer, and the verdict."""
    lines = [
        "| case | target | ours us (which) | registry picks us | best peer us | % of byte floor | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    groups, seen = jobs(results), set()
    for row in results:
        case = f"{row.workload} {describe(row)}"
        if (row.target_us is None and row.target_vs_peer is None) or case in seen:
            continue
        seen.add(case)
        same = _same_case(results, row)
        own, peer = fastest(same, peers=False), fastest(groups[job_key(row)], peers=True)
        default = next((r for r in same if r.backend == DEFAULT and r.median_us), None)
        note = f" ({row.note})" if row.note else ""
        lines.append(
            f"| {case}{note} | {_goal(row)} | {_cell(own)} | {_us(default)} | {_cell(peer, row)} | "
            f"{_percent(own)} | {verdict(row, own, peer)} |"
        )
    return lines


def verdict(goal: BenchmarkResult, own: BenchmarkResult | None, peer: BenchmarkResult | None) -> str:
    """Whether the goals of a row are met by ours, and how ours stands against the best peer."""
    if own is None or own.median_us is None:
        return "**no result of ours**"
    limits = [] if goal.target_us is None else [goal.target_us]
    if goal.target_vs_peer is not None:
        if peer is None or peer.median_us is None:
            return "no peer ran"
        limits.append(goal.target_vs_peer * peer.median_us)
    over = max(own.median_us / limit for limit in limits) - 1
    first = "target met" if over <= 0 else f"**missed by {100 * over:.0f}%**"
    return first if peer is None else f"{first}, {standing(own, peer)}"


def _goal(row: BenchmarkResult) -> str:
    us = [] if row.target_us is None else [f"{row.target_us:g}"]
    ratio = [] if row.target_vs_peer is None else [f"{row.target_vs_peer:g} x best peer"]
    return ", ".join(us + ratio)


def standing(own: BenchmarkResult, peer: BenchmarkResult) -> str:
    """Words for two rows that both have a time."""
    ratio = (peer.median_us or 0.0) / (own.median_us or 1.0)
    if ratio > 1 + TIE:
        return f"{ratio:.2f}x faster than {peer.backend}"
    if ratio < 1 / (1 + TIE):
        return f"{peer.backend} is {1 / ratio:.2f}x faster"
    return f"level with {peer.backend}"


def duel_table(results: Sequence[BenchmarkResult]) -> list[str]:
    """Every case with both a result of ours and a peer's, ours first."""
    lines = [
        "| case | ours us | GB/s | TFLOP/s | % of byte floor | best peer us | ours against it |",
        "|---|---|---|---|---|---|---|",
    ]
    for rows in jobs(results).values():
        peer = fastest(rows, peers=True)
        for params in _unique([r.params for r in rows]):
            case_rows = [r for r in rows if r.params == params]
            own = fastest(case_rows, peers=False)
            if own is None and peer is None:
                continue
            shown = own or case_rows[0]
            against = standing(own, peer) if own and peer else "no peer ran" if own else "no result of ours"
            lines.append(
                f"| {shown.workload} {describe(shown)} | {_cell(own)} | {_number(own.gbps if own else None)} | "
                f"{_number(own.tflops if own else None)} | {_percent(own)} | {_cell(peer, shown)} | {against} |"
            )
    return lines


def _unique(values: Sequence[dict]) -> list[dict]:
    found: list[dict] = []
    for v in values:
        if v not in found:
            found.append(v)
    return found


def score(results: Sequence[BenchmarkResult]) -> str:
    """Wins, ties and losses over the jobs where both sides have a result."""
    ratios = []
    for rows in jobs(results).values():
        own, peer = fastest(rows, peers=False), fastest(rows, peers=True)
        if own and peer and own.median_us and peer.median_us:
            ratios.append(peer.median_us / own.median_us)
    if not ratios:
        return "No case has both a result of ours and a peer's."
    wins = sum(r > 1 + TIE for r in ratios)
    losses = sum(r < 1 / (1 + TIE) for r in ratios)
    return (
        f"Ours against the best peer: {wins} faster, {len(ratios) - wins - losses} level (within {100 * TIE:.0f}%), "
        f"{losses} slower; median {statistics.median(ratios):.2f}x, from {min(ratios):.2f}x to {max(ratios):.2f}x."
    )


def failures(results: Sequence[BenchmarkResult]) -> list[str]:
    """Backends without a time, each reason once with how many cases it has."""
    counts: dict[tuple[str, str, str, str], int] = {}
    for r in results:
        if r.median_us is None:
            key = (r.workload, r.backend, r.status, r.reason)
            counts[key] = counts.get(key, 0) + 1
    return [f"- {w} `{b}`, {n} cases, {s}: {reason}" for (w, b, s, reason), n in counts.items()]


def section(formatter: ResultsFormatter, results: Sequence[BenchmarkResult]) -> list[str]:
    env, ceilings = formatter.environment, formatter.ceilings
    libraries = ", ".join(f"{k} {v}" for k, v in env.get("libraries", {}).items())
    lines = [
        f"## {formatter.config}",
        "",
        f"{env['device']}, driver {env['driver']}, {libraries}; commit {env['commit']}, sources {env['sources']}, "
        f"{env['date']}. `{env['command']}`",
        "",
        "Ceilings in this run: " + ", ".join(f"{k} {v:.1f}" for k, v in ceilings.items()) + ".",
        "",
    ]
    if any(r.target_us is not None or r.target_vs_peer is not None for r in results):
        lines += ["### Targets", "", *target_table(results), ""]
    if not formatter.complete:
        lines += ["**Incomplete**: the run ended before its last row.", ""]
    lines += [score(results), ""]
    for backend, column in crossovers(results).items():
        cells = ", ".join(f"{b}: {q or 'never'}" for b, q in sorted(column.items()))
        lines += [f"The prefill pipeline wins ({backend}) from this query length on, per batch size: {cells}.", ""]
    lines += ["### Every case", "", *duel_table(results), ""]
    missing = failures(results)
    if missing:
        lines += ["### Without a time", "", *missing, ""]
    return lines


def page(files: Sequence[Path]) -> str:
    """The whole page. The notes file, if there is one, holds what numbers cannot say: limits, what was tried."""
    lines = [
        "# Results",
        "",
        "Generated by `python benchmarks/report.py` from `benchmarks/results/*.json`; do not edit.",
        "",
        "Times are medians of CUDA-graph replays over rotated inputs; every row was checked against the torch",
        "reference before it was timed. `% of byte floor` is the least DRAM traffic of the call over the read",
        "bandwidth of the same run, over the time. Ours are " + ", ".join(f"`{n}`" for n in OWN) + ".",
        "",
    ]
    if NOTES.exists():
        lines += [NOTES.read_text().strip(), ""]
    for file in files:
        lines += section(*load_json(file))
    return "\n".join(lines)


def _cell(row: BenchmarkResult | None, against: BenchmarkResult | None = None) -> str:
    if row is None or row.median_us is None:
        return "-"
    name = row.backend if against is None else label(row, against)
    return f"{row.median_us:.2f} ({name})"


def _us(row: BenchmarkResult | None) -> str:
    return "-" if row is None or row.median_us is None else f"{row.median_us:.2f}"


def _percent(row: BenchmarkResult | None) -> str:
    return "-" if row is None or row.floor_percent is None else f"{row.floor_percent:.0f}%"


def _number(value: float | None) -> str:
    return "-" if not value else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args()
    files = sorted(options.results.glob("*.json"), key=lambda p: (not p.name.startswith("ops-"), p.name))
    if not files:
        print(f"report.py: error: no *.json under {options.results}", file=sys.stderr)
        return 2
    options.out.write_text(page(files))
    print(f"{options.out} from {len(files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
