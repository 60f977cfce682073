"""Run a configuration: skip what is done, measure the rest in child processes, keep every finished row."""

from __future__ import annotations

import hashlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import backends
import environment
import worker
from common import ERROR, BenchmarkResult
from configs import Case, Config
from measure import Settings

#: Longest silence of a child: one row with all its compilation.
ROW_TIMEOUT_S = 180.0

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
            params=dict(self.case.params),
            backend=self.backend,
            status=ERROR,
            reason=reason,
        )


def plan(config: Config, device: str) -> list[Row]:
    """All rows of a configuration, case by case, so that the backends of a case share its inputs."""
    chosen: dict[tuple[tuple[str, ...], str], list[str]] = {}
    rows = []
    for case in config.cases:
        key = (case.backends, case.workload)
        if key not in chosen:
            chosen[key] = backends.choose(case.backends, case.workload, device)
        rows += [Row(case, name) for name in chosen[key]]
    return rows


def fingerprint(settings: Settings, env: dict[str, Any]) -> str:
    """What two rows must share to belong to one run: settings, device, driver, libraries, sources."""
    parts = [asdict(settings), {name: env[name] for name in environment.IDENTITY}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Journal:
    """One JSON line per finished row, appended as it is measured; what a rerun resumes from."""

    path: Path
    fingerprint: str
    rows: dict[str, BenchmarkResult] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, mark: str) -> Journal:
        """Read what an earlier run of the same settings and environment left; other runs' lines are ignored."""
        journal = cls(path, mark)
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that a kill cut short
                if entry.get("fingerprint") != mark:
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
        cut_short = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            file.write(("\n" if cut_short else "") + json.dumps({"fingerprint": self.fingerprint, **entry}) + "\n")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)


def run(
    rows: Sequence[Row],
    device: str,
    settings: Settings,
    journal: Journal,
    *,
    isolate: bool,
    deadline: float | None = None,
    on_row: OnRow = lambda result, done, total: None,
) -> tuple[list[BenchmarkResult], bool]:
    """Measure the rows that the journal does not have. Returns all rows so far, and whether that is everything.

    isolate: one child process per workload, so that a crash or a lost device costs one row.
    deadline: time.monotonic() after which no further row is started.
    """
    results: list[BenchmarkResult | None] = [journal.finished(row) for row in rows]
    waiting = [i for i, result in enumerate(results) if result is None]
    done = len(rows) - len(waiting)
    if not waiting and journal.ceilings:
        return [r for r in results if r is not None], True

    def finish(index: int, result: BenchmarkResult) -> None:
        nonlocal done
        case = rows[index].case
        result.target_us, result.target_vs_peer, result.note = case.target_us, case.target_vs_peer, case.note
        results[index] = result
        journal.add(rows[index], result)
        done += 1
        on_row(result, done, len(rows))

    measure = _isolated if isolate else _in_process
    for group in _by_workload(rows, waiting):
        if not _time_left(deadline):
            break
        measure(rows, group, device, settings, journal, finish, deadline)
    return [r for r in results if r is not None], all(r is not None for r in results)


def _by_workload(rows: Sequence[Row], indices: Iterable[int]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for i in indices:
        groups.setdefault(rows[i].case.workload, []).append(i)
    return list(groups.values())


def _time_left(deadline: float | None) -> bool:
    return deadline is None or time.monotonic() < deadline


def _in_process(rows, group, device, settings, journal, finish, deadline) -> None:
    pending = list(group)

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "ceilings":
            journal.set_ceilings(event["ceilings"])
        elif event["event"] == "row":
            finish(pending.pop(0), BenchmarkResult.from_dict(event["result"]))

    worker.run_job({**_job([], device, settings), "ceilings": not journal.ceilings}, on_event)
    while pending and _time_left(deadline):
        worker.run_job(_job([rows[pending[0]]], device, settings), on_event)


def _isolated(rows, group, device, settings, journal, finish, deadline) -> None:
    """One child for the group; after a crash, a fresh one for what is left, less the row that crashed."""
    pending = list(group)
    while pending and _time_left(deadline):
        job = {**_job([rows[i] for i in pending], device, settings), "ceilings": not journal.ceilings}
        before = len(pending)
        ended = _child(job, pending, journal, finish, deadline)
        if pending and ended is not None:
            crashed = pending.pop(0)
            finish(crashed, rows[crashed].failed(ended))
        elif len(pending) == before:
            break  # stopped by the deadline


def _job(rows: Sequence[Row], device: str, settings: Settings) -> dict[str, Any]:
    return {"device": device, "settings": asdict(settings), "rows": [row.job() for row in rows]}


def _child(job, pending: list[int], journal: Journal, finish, deadline: float | None) -> str | None:
    """Run one child until it ends. Returns why the first pending row has no result, or None when that is not its
    fault: everything is done, its context was lost by a row already reported, or the deadline has passed."""
    child = subprocess.Popen(
        [sys.executable, str(Path(worker.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(job))
    child.stdin.close()
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    threading.Thread(target=_forward, args=(child.stdout, lines), daemon=True).start()
    threading.Thread(target=_keep, args=(child.stderr, errors), daemon=True).start()
    try:
        while True:
            wait = ROW_TIMEOUT_S if deadline is None else min(ROW_TIMEOUT_S, max(1.0, deadline + 30 - time.monotonic()))
            try:
                line = lines.get(timeout=wait)
            except queue.Empty:
                late = deadline is not None and not _time_left(deadline)
                return None if late else f"no result within {ROW_TIMEOUT_S:.0f} s"
            if line is None:
                break
            event = json.loads(line)
            if event["event"] == "ceilings":
                journal.set_ceilings(event["ceilings"])
            elif event["event"] == "row":
                finish(pending.pop(0), BenchmarkResult.from_dict(event["result"]))
            elif not _time_left(deadline):
                return None
        code = child.wait()
        if code in (0, worker.CONTEXT_LOST):
            return None
        return f"the process ended with code {code}: {' '.join(''.join(errors[-3:]).split())[-300:]}"
    finally:
        child.kill()
        child.wait()


def _forward(stream, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _keep(stream, errors: list[str]) -> None:
    """Last lines of a child's stderr, for the reason of a crash."""
    for line in stream:
        errors.append(line)
        del errors[:-40]
