"""Tables of the results page: targets, one line per case with every backend, and grids for large configurations."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import backends
from benchmarks.batch_spec import parse_batch_spec
from benchmarks.common import BenchmarkResult, describe, job_key, label

#: Closer than this is a tie.
TIE = 0.03
#: More cases than this make a grid instead of a line each.
LINES = 16

Params = dict[str, Any]
Wanted = Callable[[BenchmarkResult], bool]


def jobs(results: Sequence[BenchmarkResult]) -> dict[str, list[BenchmarkResult]]:
    """Rows by what they do, whatever the cache format."""
    groups: dict[str, list[BenchmarkResult]] = {}
    for row in results:
        groups.setdefault(job_key(row), []).append(row)
    return groups


def cases(results: Sequence[BenchmarkResult]) -> list[list[BenchmarkResult]]:
    """Rows by workload and exact parameters, in the order of measurement."""
    groups: dict[str, list[BenchmarkResult]] = {}
    for row in results:
        groups.setdefault(f"{row.workload} {sorted(row.params.items())}", []).append(row)
    return list(groups.values())


def fastest(rows: Sequence[BenchmarkResult], wanted: Wanted = lambda row: True) -> BenchmarkResult | None:
    timed = [r for r in rows if r.median_us and wanted(r)]
    return min(timed, key=lambda r: r.median_us or 0.0, default=None)


def is_own(row: BenchmarkResult) -> bool:
    return backends.is_own(row.backend, row.workload)


def is_peer(row: BenchmarkResult) -> bool:
    return backends.is_peer(row.backend, row.workload)


def is_default(row: BenchmarkResult) -> bool:
    return row.backend == backends.DEFAULT


# ---- targets


def target_table(results: Sequence[BenchmarkResult]) -> list[str]:
    """One line per case that has a target: ours, what the registry picks, the best peer, and the verdict."""
    lines = [
        "| case | target | ours us (which) | registry picks us | best peer us | % of byte floor | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    groups = jobs(results)
    for case in cases(results):
        goal = case[0]
        if goal.target_us is None and goal.target_vs_peer is None:
            continue
        own, default = fastest(case, is_own), fastest(case, is_default)
        peer = fastest(groups[job_key(goal)], is_peer)
        note = f" ({goal.note})" if goal.note else ""
        lines.append(
            f"| {goal.workload} {describe(goal)}{note} | {_goal(goal)} | {cell(own)} | {us(default)} | "
            f"{cell(peer, goal)} | {percent(own)} | {verdict(goal, own, peer)} |"
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
    absolute = [] if row.target_us is None else [f"{row.target_us:g}"]
    relative = [] if row.target_vs_peer is None else [f"{row.target_vs_peer:g} x best peer"]
    return ", ".join(absolute + relative)


def standing(own: BenchmarkResult, peer: BenchmarkResult) -> str:
    """Words for two rows that both have a time."""
    ratio = (peer.median_us or 0.0) / (own.median_us or 1.0)
    if ratio > 1 + TIE:
        return f"{ratio:.2f}x faster than {peer.backend}"
    if ratio < 1 / (1 + TIE):
        return f"{peer.backend} is {1 / ratio:.2f}x faster"
    return f"level with {peer.backend}"


# ---- score


def ratios(results: Sequence[BenchmarkResult], wanted: Wanted) -> list[tuple[float, BenchmarkResult]]:
    """Best peer's time over the fastest wanted row's, with that row, for every job where both have a result."""
    found = []
    for rows in jobs(results).values():
        mine, peer = fastest(rows, wanted), fastest(rows, is_peer)
        if mine and peer and mine.median_us and peer.median_us:
            found.append((peer.median_us / mine.median_us, mine))
    return found


def score(results: Sequence[BenchmarkResult], wanted: Wanted = is_own) -> dict[str, Any] | None:
    """Wins, ties, losses, and the distribution of best peer over ours; None without a case that has both."""
    found = ratios(results, wanted)
    if not found:
        return None
    values = [ratio for ratio, _ in found]
    wins, losses = sum(v > 1 + TIE for v in values), sum(v < 1 / (1 + TIE) for v in values)
    return {
        "wins": wins,
        "level": len(values) - wins - losses,
        "losses": losses,
        "median": statistics.median(values),
        "best": max(found, key=lambda item: item[0]),
        "worst": min(found, key=lambda item: item[0]),
    }


# ---- every case


def case_tables(results: Sequence[BenchmarkResult], baseline: str = "", unit: str = "us") -> list[str]:
    """A table per workload: a line per case, or a grid where there are many."""
    lines: list[str] = []
    for workload in dict.fromkeys(r.workload for r in results):
        rows = [r for r in results if r.workload == workload]
        if len(cases(rows)) <= LINES:
            lines += [f"`{workload}`, us:", "", *line_table(rows, baseline), ""]
        else:
            lines += [f"`{workload}`, {unit}, ours / best peer (our % of the byte floor):", "", *grid(rows, unit), ""]
    return lines


def line_table(rows: Sequence[BenchmarkResult], baseline: str) -> list[str]:
    """Cases by backends. Bold: the fastest; the rates and the floor are of our fastest one."""
    names = [b for b in dict.fromkeys(r.backend for r in rows) if any(r.median_us for r in rows if r.backend == b)]
    more = ["speed-up", "reduction"] if baseline in names else []
    lines = [
        _line(["case", *names, "GB/s", "TFLOP/s", "% floor", *more]),
        _line(["---"] * (len(names) + 4 + len(more))),
    ]
    for case in cases(rows):
        best, own = fastest(case), fastest(case, is_own) or fastest(case)
        times = {r.backend: f"{r.median_us:.2f}" if r.median_us else r.status for r in case}
        if best is not None:
            times[best.backend] = f"**{times[best.backend]}**"
        cells = [describe(case[0]), *(times.get(b, "") for b in names)]
        cells += [number(own.gbps if own else None), number(own.tflops if own else None), percent(own)]
        base = next((r.median_us for r in case if r.backend == baseline), None)
        if more:
            ratio = base / own.median_us if base and own and own.median_us else None
            cells += ["-", "-"] if ratio is None else [f"{ratio:.2f}x", f"{100 * (1 - 1 / ratio):.0f}%"]
        lines.append(_line(cells))
    return lines


#: Parameters that make good columns, best first.
_COLUMNS = ("context", "q_len", "tokens", "batch", "rows")


def grid(rows: Sequence[BenchmarkResult], unit: str = "us") -> list[str]:
    """Cells `ours / best peer (our % of the byte floor)`, the faster in bold; "-" where one has no time."""
    kind = rows[0].workload
    keys = [(spread_out(case[0].params), case) for case in cases(rows)]
    varying = [k for k in keys[0][0] if len({str(p.get(k)) for p, _ in keys}) > 1]
    column = next((k for k in _COLUMNS if k in varying), varying[-1])
    columns = sorted({p[column] for p, _ in keys})
    groups = jobs(rows)
    table: dict[tuple[str, ...], dict[Any, tuple[BenchmarkResult | None, BenchmarkResult | None]]] = {}
    for params, case in keys:
        line = tuple(f"{k}={params[k]}" for k in varying if k != column)
        own = fastest(case, is_own) or fastest(case, is_default)
        table.setdefault(line, {})[params[column]] = (own, fastest(groups[job_key(case[0])], is_peer))
    lines = [
        _line([f"{kind}, {column}:", *map(str, columns), "ours", "best peer"]),
        _line(["---"] * (len(columns) + 3)),
    ]
    for line, cells in sorted(table.items(), key=lambda item: [_sortable(x) for x in item[0]]):
        own_names = list(dict.fromkeys(o.backend for o, _ in cells.values() if o))
        peer_names = list(dict.fromkeys(p.backend for _, p in cells.values() if p))
        shown = [_pair(*cells.get(c, (None, None)), unit) for c in columns]
        lines.append(_line([" ".join(line), *shown, ", ".join(own_names), ", ".join(peer_names)]))
    return lines


def _pair(own: BenchmarkResult | None, peer: BenchmarkResult | None, unit: str) -> str:
    mine, theirs = (short(r.gbps if unit == "GB/s" else r.median_us) if r else "-" for r in (own, peer))
    if own and peer and own.median_us and peer.median_us:
        ratio = peer.median_us / own.median_us
        mine = f"**{mine}**" if ratio > 1 + TIE else mine
        theirs = f"**{theirs}**" if ratio < 1 / (1 + TIE) else theirs
    return "" if mine == theirs == "-" else f"{mine} / {theirs}" + (f" ({percent(own)})" if own else "")


def spread_out(params: Params) -> Params:
    """A batch spec of equal requests as batch, q_len and context, so that it can be an axis."""
    if "batch_spec" not in params:
        return params
    requests = {r.as_tuple() for r in parse_batch_spec(params["batch_spec"])}
    if len(requests) != 1:
        return params
    q_len, context = next(iter(requests))
    size = len(parse_batch_spec(params["batch_spec"]))
    rest = {k: v for k, v in params.items() if k != "batch_spec"}
    return {**rest, "batch": size, "q_len": q_len, "context": context}


def _sortable(text: str) -> tuple[str, float, str]:
    name, _, value = text.partition("=")
    try:
        return name, float(value), ""
    except ValueError:
        return name, 0.0, value


# ---- rows without a time


def failures(results: Sequence[BenchmarkResult]) -> list[str]:
    """Backends without a time, each reason once with how many cases it has; errors before what cannot run here."""
    counts: dict[tuple[str, str, str, str], int] = {}
    for r in results:
        if r.median_us is None:
            key = (r.status, r.workload, r.backend, r.reason)
            counts[key] = counts.get(key, 0) + 1
    lines = sorted(counts.items())
    return [f"- {w} `{b}`, {count(n, 'case')}, {s}: {reason}" for (s, w, b, reason), n in lines]


def count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


# ---- cells


def cell(row: BenchmarkResult | None, against: BenchmarkResult | None = None) -> str:
    if row is None or row.median_us is None:
        return "-"
    name = row.backend if against is None else label(row, against)
    return f"{row.median_us:.2f} ({name})"


def us(row: BenchmarkResult | None) -> str:
    return "-" if row is None or row.median_us is None else f"{row.median_us:.2f}"


def percent(row: BenchmarkResult | None) -> str:
    return "-" if row is None or row.floor_percent is None else f"{row.floor_percent:.0f}%"


def number(value: float | None) -> str:
    return "-" if not value else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def short(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
