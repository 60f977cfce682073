"""What a run shows: a progress bar on a terminal, plain lines otherwise, and tables that never cut a number."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from benchmarks.common import BenchmarkResult, ResultsFormatter, describe, job_key
from benchmarks.report.tables import cases, failures
from benchmarks.schema import Config

#: Columns where the output is not a terminal and COLUMNS does not say.
WIDE = 200
COLUMNS = ("us", "spread", "GB/s", "TFLOP/s", "% floor", "vs peer", "speed-up", "reduction", "peak MiB")


class Line(NamedTuple):
    """name, then a cell for each column; "" where there is nothing to say."""

    name: str
    cells: Sequence[str]
    style: str = ""


def console() -> Console:
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if narrow else WIDE, highlight=False, markup=False, emoji=False)


def print_table(out: Console, columns: Sequence[str], groups: Sequence[tuple[str, Sequence[Line]]]) -> None:
    """Groups of lines under headings, one width per column for all. Columns without any cell are left out; where the
    terminal is too narrow for the others, each line becomes words, which are folded between its cells."""
    lines = [line for _, group in groups for line in group]
    used = [i for i in range(len(columns)) if any(line.cells[i] for line in lines)]
    titles = ["", *(columns[i] for i in used)]
    rows = {id(line): [line.name, *(line.cells[i] for i in used)] for line in lines}
    widths = [max(len(cells[i]) for cells in (titles, *rows.values())) for i in range(len(titles))]
    fits = 2 + sum(widths) + 2 * (len(widths) - 1) <= out.width
    if fits and lines:
        out.print(_grid([(titles, "bold")], widths))
    for heading, group in groups:
        out.print(Text(heading))
        if fits and group:
            out.print(_grid([(rows[id(line)], line.style) for line in group], widths))
        for line in () if fits else group:
            named = zip(rows[id(line)][1:], titles[1:], strict=True)
            text = ", ".join(f"{cell}\N{NO-BREAK SPACE}{title}" for cell, title in named if cell)
            out.print(Padding(Text(f"{line.name}: {text}", style=line.style), (0, 0, 0, 2)))


def _grid(rows: Sequence[tuple[Sequence[str], str]], widths: Sequence[int]) -> Padding:
    table = Table.grid(padding=(0, 2, 0, 0))
    for i, width in enumerate(widths):
        table.add_column(min_width=width, no_wrap=True, justify="right" if i else "left")
    for cells, style in rows:
        table.add_row(*cells, style=style)
    return Padding(table, (0, 0, 0, 2))


def cells(row: BenchmarkResult) -> list[str]:
    """The cells of a row that has a time, one for each of COLUMNS."""
    return [
        _number(row.median_us, ".2f"),
        _number(100 * (row.spread or 0), ".1f", "%"),
        _number(row.gbps, _form(row.gbps)),
        _number(row.tflops or None, ".1f"),
        _number(row.floor_percent, ".1f"),
        _number(row.vs_peer, ".2f"),
        _number(row.speedup, _form(row.speedup), "x"),
        _number(row.reduction, ".1f", "%"),
        _number(row.peak_memory_mib, ".1f"),
    ]


def _form(value: float | None) -> str:
    """Digits of a rate or a ratio: two or more that count."""
    return ".0f" if not value or value >= 100 else ".2f" if value >= 0.1 else ".2g"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def print_results(out: Console, formatter: ResultsFormatter, results: Sequence[BenchmarkResult]) -> None:
    """Every case with its timed rows, the fastest of each job in green; then what has no time, each reason once."""
    best = {id(r) for r in _best_rows(results)}
    groups = []
    for case in cases([r for r in results if r.median_us is not None]):
        peer = f"   (best peer: {case[0].best_peer})" if case[0].best_peer else ""
        lines = [Line(r.backend, cells(r), "bold green" if id(r) in best else "") for r in case]
        groups.append((f"{case[0].workload} {describe(case[0])}{peer}", lines))
    print_table(out, COLUMNS, groups)
    for reason in failures(results):
        out.print(Text(reason.replace("`", "")))
    out.print("ceilings: " + ", ".join(f"{name} {value:.1f}" for name, value in formatter.ceilings.items()))


def _best_rows(results: Sequence[BenchmarkResult]) -> list[BenchmarkResult]:
    """The fastest row of every job."""
    best: dict[str, BenchmarkResult] = {}
    for r in sorted((r for r in results if r.median_us is not None), key=lambda r: r.median_us or 0.0):
        best.setdefault(job_key(r), r)
    return list(best.values())


class Screen:
    """Context manager around a run; `row` as rows finish, `table` at the end."""

    def __init__(self, config: Config, env: dict[str, Any], total: int, reused: int):
        self.console = console()
        self.progress: Progress | None = None
        self.config, self.device, self.total, self.reused = config, env["device"], total, reused

    def __enter__(self) -> Screen:
        about = " ".join(self.config.description.split())
        self.console.print(f"{self.config.name} on {self.device}" + (f": {about}" if about else ""))
        if self.reused:
            self.console.print(
                f"{self.reused} of {self.total} rows kept from an interrupted run (--fresh measures them again)"
            )
        if self.console.is_terminal:
            columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self.progress = Progress(*columns, console=self.console)
            self.progress.start()
            self.task = self.progress.add_task("", total=self.total, completed=self.reused)
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def row(self, result: BenchmarkResult, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=done, description=f"{result.workload} {result.backend}")
            return
        named = zip(cells(result), COLUMNS, strict=True)
        shown = ", ".join(f"{cell} {name}" for cell, name in named if cell)
        words = shown if result.median_us is not None else f"{result.status}: {result.reason}"
        print(f"[{done}/{total}] {result.workload} {describe(result)} {result.backend}: {words}", flush=True)

    def table(self, formatter: ResultsFormatter, results: Sequence[BenchmarkResult]) -> None:
        print_results(self.console, formatter, results)
