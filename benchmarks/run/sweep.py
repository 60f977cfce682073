"""Run a configuration: skip what is done, measure the rest in child processes, keep every finished row."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import backends
from benchmarks.common import ERROR, BenchmarkResult
from benchmarks.run import environment, worker
from benchmarks.run.child import LATE, Child
from benchmarks.schema import Case, Config, Settings
from benchmarks.workloads import workload

#: A backend that took the process down this often is not tried on the workload's other cases in this run.
MAX_CRASHES = 2

OnRow = Callable[[BenchmarkResult, int, int], None]


@dataclass(frozen=True)
class Row:
    """One row to measure."""

    case: Case
    backend: str

    def key(self) -> str:
        return json.dumps([self.case.workload, dict(self.case.params), self.backend], sort_keys=True)

    def job(self) -> dict[str, Any]:
        return {"workload": self.case.workload, "params": dict(self.case.params), "backend": self.backend}

    def failed(self, reason: str) -> BenchmarkResult:
        return BenchmarkResult(
            workload=self.case.workload,
            params=workload(self.case.workload).complete(self.case.params),
            backend=self.backend,
            status=ERROR,
            reason=reason,
        )


def plan(config: Config, device: str) -> list[Row]:
    """All rows of a configuration, case by case, so that the backends of a case share its inputs; a row that several
    runs of the configuration name is there once. Raises ValueError for a backend that none of its workloads has."""
    kinds = [case.workload for case in config.cases]
    backends.check_names([name for names in {c.backends for c in config.cases} for name in names], kinds)
    chosen: dict[tuple[tuple[str, ...], str], list[str]] = {}
    rows: dict[str, Row] = {}
    for case in config.cases:
        key = (case.backends, case.workload)
        if key not in chosen:
            chosen[key] = backends.choose(case.backends, case.workload, device)
        for name in chosen[key]:
            row = Row(case, name)
            rows.setdefault(row.key(), row)
    return list(rows.values())


def fingerprint(settings: Settings, env: dict[str, Any]) -> str:
    """What two rows must share to belong to one run: settings, device, driver, libraries, sources."""
    parts = [settings.model_dump(), {name: env[name] for name in environment.IDENTITY}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Journal:
    """One JSON line per finished row, appended as it is measured; what a rerun resumes from."""

    path: Path
    fingerprint: str
    rows: dict[str, BenchmarkResult] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    others: int = 0

    @classmethod
    def open(cls, path: Path, mark: str) -> Journal:
        """Read what an earlier run of the same settings and environment left; other runs' rows are only counted."""
        journal = cls(path, mark)
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that a kill cut short
                if entry.get("fingerprint") != mark:
                    journal.others += "key" in entry
                    continue
                if "ceilings" in entry:
                    journal.ceilings = entry["ceilings"]
                else:
                    journal.rows[entry["key"]] = BenchmarkResult.from_dict(entry["result"])
        return journal

    def finished(self, row: Row) -> BenchmarkResult | None:
        """The row's earlier result if it has a time; failed rows are measured again."""
        result = self.rows.get(row.key())
        return result if result is not None and result.success else None

    def add(self, row: Row, result: BenchmarkResult) -> None:
        self.rows[row.key()] = result
        self._append({"key": row.key(), "result": result.as_dict()})

    def set_ceilings(self, ceilings: dict[str, float]) -> None:
        self.ceilings = ceilings
        self._append({"ceilings": ceilings})

    def _append(self, entry: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a kill cut the last line short
                    file.write(b"\n")
            file.write(json.dumps({"fingerprint": self.fingerprint, **entry}).encode() + b"\n")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)


def run(
    rows: Sequence[Row],
    device: str,
    settings: Settings,
    journal: Journal,
    *,
    child: Child | None = None,
    deadline: float | None = None,
    on_row: OnRow = lambda result, done, total: None,
) -> tuple[list[BenchmarkResult], bool]:
    """Measure the rows that the journal does not have. Returns all rows so far, and whether that is everything.

    child: the process to measure in, so that a crash or a lost device costs one row; None measures in this one.
    deadline: time.monotonic() after which no further row is started.
    """
    results: list[BenchmarkResult | None] = [journal.finished(row) for row in rows]
    waiting = [i for i, result in enumerate(results) if result is None]
    common = {"device": device, "settings": settings.model_dump()}
    crashes: dict[tuple[str, str], list[str]] = {}
    if waiting and not journal.ceilings and _time_left(deadline):
        event, _ = _answer({**common, "ceilings": True}, child, deadline)
        if event is not None:
            journal.set_ceilings(event["result"])
    for i in waiting:
        if not _time_left(deadline):
            break
        kind = (rows[i].case.workload, rows[i].backend)
        if len(crashes.get(kind, ())) >= MAX_CRASHES:
            event, reason = None, f"not tried after {MAX_CRASHES} crashes: {crashes[kind][-1]}"
        else:
            event, reason = _answer({**common, "row": rows[i].job()}, child, deadline)
            if reason == LATE:
                break
            if event is None:
                crashes.setdefault(kind, []).append(reason)
        result = rows[i].failed(reason) if event is None else BenchmarkResult.from_dict(event["result"])
        case = rows[i].case
        result.target_us, result.target_vs_peer, result.note = case.target_us, case.target_vs_peer, case.note
        results[i] = result
        journal.add(rows[i], result)
        on_row(result, sum(r is not None for r in results), len(rows))
    return [r for r in results if r is not None], all(r is not None for r in results)


def _time_left(deadline: float | None) -> bool:
    return deadline is None or time.monotonic() < deadline


def _answer(job: dict[str, Any], child: Child | None, deadline: float | None) -> tuple[dict[str, Any] | None, str]:
    """The event that answers a job, or None and the reason."""
    events: list[dict[str, Any]] = []
    if child is None:
        worker.run_job(job, events.append)
        reason = None
    else:
        reason = child.run(job, events.append, deadline)
    return (events[0], "") if events else (None, reason or "the process ended without an answer")
