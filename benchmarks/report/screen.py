"""What a run shows: a rich table and progress bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.common import BenchmarkResult, ResultsFormatter, job_key
from benchmarks.schema import Config


class Screen:
    """Context manager around a run; `row` as rows finish, `table` at the end."""

    def __init__(self, config: Config, env: dict[str, Any], total: int, reused: int):
        self.rich = sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
        self.title = f"{config.name} on {env['device']}"
        self.progress: Any = None
        self.total, self.reused = total, reused
        self.description = config.description

    def __enter__(self) -> Screen:
        print(self.title + (f": {' '.join(self.description.split())}" if self.description else ""))
        if self.reused:
            print(f"{self.reused} of {self.total} rows kept from an interrupted run (--fresh measures them again)")
        if self.rich:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self.progress = Progress(*columns)
            self.progress.start()
            self.task = self.progress.add_task("", total=self.total, completed=self.reused)
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def row(self, cells: Sequence[str], done: int, total: int) -> None:
        workload, case, backend, *numbers = cells
        if self.progress is not None:
            self.progress.update(self.task, completed=done, description=f"{workload} {case} {backend}")
            return
        units = ("us", "spread", "GB/s", "TFLOP/s", "% of the byte floor")
        shown = (
            numbers[0] if not numbers[1] else ", ".join(f"{n} {u}" for n, u in zip(numbers, units, strict=False) if n)
        )
        print(f"[{done}/{total}] {workload} {case} {backend}: {shown}", flush=True)

    def table(self, formatter: ResultsFormatter, results: Sequence[BenchmarkResult]) -> None:
        ceilings = ", ".join(f"{name} {value:.1f}" for name, value in formatter.ceilings.items())
        if not self.rich:
            print(formatter.text(results))
            print(f"ceilings: {ceilings}")
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(*formatter.columns(), title=self.title, caption=f"ceilings: {ceilings}")
        best = {id(r) for r in _best_rows(results)}
        for r in results:
            table.add_row(*formatter.cells(r, results), style="bold green" if id(r) in best else "")
        Console().print(table)


def _best_rows(results: Sequence[BenchmarkResult]) -> list[BenchmarkResult]:
    """The fastest row of every job."""
    best: dict[str, BenchmarkResult] = {}
    for r in sorted((r for r in results if r.median_us is not None), key=lambda r: r.median_us or 0.0):
        best.setdefault(job_key(r), r)
    return list(best.values())
