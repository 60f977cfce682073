"""On a terminal of any usual width every number of a table can be read back."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

import pytest

from benchmarks.common import BenchmarkResult, load_json
from benchmarks.report import compare, screen

from .conftest import SUITE
from .test_command_line import ONE_ROW

WIDTHS = (80, 100, 120)
FILES = sorted((SUITE / "results").glob("*.json"))


def on_a_terminal(columns: int, arguments: list[str]) -> str:
    """What a Python command prints on a terminal that is `columns` wide, without its colours."""
    child, terminal = pty.fork()
    if child == 0:
        environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"TERM": "xterm"}
        os.execve(sys.executable, [sys.executable, *arguments], environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    text = b""
    while True:
        try:
            text += os.read(terminal, 1 << 16)
        except OSError:  # the child has closed its end
            break
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, text.decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode()).replace("\r", "")


def numbers(row: BenchmarkResult) -> list[str]:
    return [cell for cell in screen.cells(row) if cell]


def read_back(text: str, row_names: list[str]) -> list[tuple[str, list[str]]]:
    """(backend, cells) of every line of a table, or of its words where the table did not fit."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        words = line.replace("\N{NO-BREAK SPACE}", " ").split()
        if line.startswith("  ") and words and words[0].rstrip(":") in row_names:
            found.append((words[0].rstrip(":"), []))
        elif not line.startswith("  "):
            found.append(("", []))
        if found and words:
            found[-1][1].extend(w.strip(",") for w in words if re.fullmatch(r"-?[0-9.]+(e[+-]?\d+)?[x%]?,?", w))
    return [(name, cells) for name, cells in found if name]


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_committed_number_can_be_read_back(path: Path, columns: int, monkeypatch, capsys) -> None:
    _, results = load_json(path)
    monkeypatch.setenv("COLUMNS", str(columns))
    screen.print_results(screen.console(), load_json(path)[0], results)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    timed = [r for group in screen.cases([r for r in results if r.median_us is not None]) for r in group]
    assert read_back(text, [r.backend for r in timed]) == [(r.backend, numbers(r)) for r in timed]


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_run_on_a_terminal(columns: int, tmp_path: Path) -> None:
    """The real command: a progress bar, and the numbers of its own results file."""
    words = ["--backends", "torch", "torch_cat", "--param", "dtype=bf16,fp8", "--output-json", str(tmp_path / "a.json")]
    text = on_a_terminal(columns, ["-m", "benchmarks", *ONE_ROW, *words])
    _, results = load_json(tmp_path / "a.json")
    lines = text.splitlines()
    assert "4/4" in text
    assert "…" not in text
    # The file keeps six digits of a number, the table rounds the number itself: compare as the file has it.
    shown = read_back("\n".join(lines[-12:]), ["torch", "torch_cat"])
    by_case = [r for group in screen.cases(results) for r in group]
    assert [name for name, _ in shown] == [r.backend for r in by_case]
    for (_, cells), row in zip(shown, by_case, strict=True):
        assert cells[0] == numbers(row)[0]
        assert len(cells) == len(numbers(row))


@pytest.mark.parametrize("columns", [30, *WIDTHS])
def test_long_numbers_and_names(columns: int, monkeypatch, capsys) -> None:
    """Where a table does not fit, lines become words; a number is whole even then."""
    cells = ("123456789.12", "100.0%", "4321", "1234.5", "99.9", "1234.56", "12345.67x", "-99999.9%", "123456.7")
    lines = [screen.Line(name, cells) for name in ("sglang_two_kernels_and_more", "b")]
    monkeypatch.setenv("COLUMNS", str(columns))
    screen.print_table(screen.console(), screen.COLUMNS, [("a heading", lines)])
    text = capsys.readouterr().out
    assert read_back(text, [line.name for line in lines]) == [(line.name, list(cells)) for line in lines]
    assert max(map(len, text.splitlines())) <= columns


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_comparison_can_be_read_back(columns: int, monkeypatch, capsys) -> None:
    path = SUITE / "results" / "cutlass_mla-h200.json"
    monkeypatch.setenv("COLUMNS", str(columns))
    assert compare.compare_files(path, path) == 0
    text = capsys.readouterr().out
    rows = [r for group in screen.cases(load_json(path)[1]) for r in group]
    shown = read_back(text, [r.backend for r in rows])
    us = [f"{r.median_us:.2f}" if r.median_us else None for r in rows]
    assert [cells[:3] for _, cells in shown] == [[u, u, "1.000"] if u else [] for u in us]
