"""Do the peers take as long here as they took in an earlier, independent measurement (peer_baseline.yaml)?"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.batch_spec import parse_batch_spec
from benchmarks.common import BenchmarkResult

DATA = Path(__file__).resolve().parent / "peer_baseline.yaml"
#: Two runs on two machines of one kind differ by this much, or by this many microseconds.
NOISE, NOISE_US = 0.05, 0.3


@dataclass(frozen=True)
class Pair:
    """A peer's time then and now, of the same case."""

    workload: str
    backend: str
    case: str
    before_us: float
    now_us: float

    @property
    def ratio(self) -> float:
        return self.now_us / self.before_us

    @property
    def same(self) -> bool:
        return abs(self.now_us - self.before_us) <= max(NOISE * self.before_us, NOISE_US)


@functools.cache
def load() -> dict[str, Any]:
    import yaml

    return yaml.safe_load(DATA.read_text())


def pairs(results: Sequence[BenchmarkResult], device: str) -> list[Pair]:
    """Every earlier number whose case `results` have too (the first row, where several files have it)."""
    data = load()
    if device != data["device"]:
        return []
    timed = [r for r in results if r.median_us]
    found = []
    for table in data["tables"]:
        mine = [r for r in timed if r.workload == table["workload"]]
        rows = [r for r in mine if r.backend == table["backend"]] or [r for r in mine if r.backend == table.get("now")]
        for key, times in table["us"].items():
            for column, before in zip(table["columns"], times, strict=True):
                varying = {table["column"]: column} | ({} if table["row"] == "_" else {table["row"]: key})
                row = next((r for r in rows if _matches(r, {**table["params"], **varying})), None)
                if row is not None and row.median_us:
                    case = " ".join(f"{k}={v}" for k, v in (table["params"] | varying).items())
                    found.append(Pair(row.workload, table["backend"], case, before, row.median_us))
    return found


def missing(found: Sequence[Pair]) -> dict[tuple[str, str], int]:
    """(operation, peer) -> earlier numbers whose case has no time here."""
    counts: dict[tuple[str, str], int] = {}
    for t in load()["tables"]:
        key = (t["workload"], t["backend"])
        counts[key] = counts.get(key, 0) + sum(map(len, t["us"].values()))
    for pair in found:
        counts[pair.workload, pair.backend] -= 1
    return {key: count for key, count in counts.items() if count}


def _matches(row: BenchmarkResult, params: dict[str, Any]) -> bool:
    for name, value in params.items():
        mine = row.params.get(name)
        if mine != value and (name != "batch_spec" or _lengths(str(mine)) != _lengths(value)):
            return False
    return True


def _lengths(spec: str) -> list[tuple[int, int]]:
    return [request.as_tuple() for request in parse_batch_spec(spec)]


def table(found: Sequence[Pair]) -> list[str]:
    """One line per peer, and one per case that is not within noise."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in found:
        groups.setdefault((pair.workload, pair.backend), []).append(pair)
    why = {(t["workload"], t["backend"]): t["differs"] for t in load()["tables"] if "differs" in t}
    lines = [
        "| operation | peer | cases | within noise | now / then: median (range) | where not, and why |",
        "|---|---|---|---|---|---|",
    ]
    for key, group in groups.items():
        ratios = [p.ratio for p in group]
        others = sorted((p for p in group if not p.same), key=lambda p: -abs(p.ratio - 1))
        shown = "; ".join(f"{p.case}: {p.now_us:.1f} for {p.before_us:g} us" for p in others[:3])
        more = f"; {len(others) - 3} more" if len(others) > 3 else ""
        reason = f"{shown}{more}. {why.get(key, '')}".strip() if others else ""
        lines.append(
            f"| {key[0]} | {key[1]} | {len(group)} | {len(group) - len(others)} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {reason} |"
        )
    return lines
