"""The committed table of compiled kernels: one row per target and case, so that a change of kernels shows in review."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.compile_matrix import Result

_COLUMNS = (
    "target",
    "kernel",
    "warps",
    "stages",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "occupancy",
    "matrix_instructions",
)
_REGISTERS, _OCCUPANCY = _COLUMNS.index("registers"), _COLUMNS.index("occupancy")
#: Seen on gfx950: the same kernel got 12 or 17 registers, depending on what else the process had compiled before it.
REGISTER_SLACK = 8
_Key = tuple[str, str]


def _row(result: Result) -> tuple[str, ...]:
    return (
        result.target,
        f"{result.op}.{result.case}",
        str(result.warps),
        str(result.stages),
        str(result.registers),
        str(result.spill_bytes),
        str(result.shared_bytes),
        f"{result.occupancy:.3f}",
        " ".join(result.matrix_instructions),
    )


def _read(path: pathlib.Path) -> dict[_Key, tuple[str, ...]]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(row[0], row[1]): tuple(row) for row in list(csv.reader(file))[1:]}


def _of(results: Sequence[Result]) -> dict[_Key, tuple[str, ...]]:
    return {(row[0], row[1]): row for row in map(_row, results)}


def _scope(
    rows: Mapping[_Key, tuple[str, ...]], targets: Collection[str], ops: Sequence[str]
) -> dict[_Key, tuple[str, ...]]:
    return {k: row for k, row in rows.items() if k[0] in targets and k[1].split(".")[0] in ops}


def write(path: pathlib.Path, results: Sequence[Result], targets: Collection[str], ops: Sequence[str]) -> None:
    """Replace the rows of the targets and operations, also of those that nothing was compiled for; keep the others."""
    rows, kept = _of(results), _read(path)
    for key in _scope(kept, targets, ops):
        del kept[key]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(row for _, row in sorted({**kept, **rows}.items()))


def differences(
    path: pathlib.Path,
    results: Sequence[Result],
    targets: Collection[str],
    ops: Sequence[str],
    listed: Collection[_Key] = (),
) -> list[str]:
    """What the results have that the table's rows of the targets and operations have not, and the reverse.

    listed: (target, operation.case) of cases that were not compiled: the table has a row of each, whatever it says.
    """
    rows = _of(results)
    old = _scope(_read(path), targets, ops)
    lines = []
    for key in sorted(rows.keys() | old.keys() | set(listed)):
        before, now = old.get(key), rows.get(key)
        if key in listed and now is None:
            lines += [] if before else [f"+ {' | '.join(key)}"]
        elif not _same(before, now):
            lines += [f"- {' | '.join(before)}"] if before else []
            lines += [f"+ {' | '.join(now)}"] if now else []
    return lines


def _same(before: tuple[str, ...] | None, now: tuple[str, ...] | None) -> bool:
    """Equal but for a few registers, and the occupancy that follows from them."""
    if before is None or now is None:
        return before == now
    if abs(int(before[_REGISTERS]) - int(now[_REGISTERS])) > REGISTER_SLACK:
        return False
    return all(a == b for i, (a, b) in enumerate(zip(before, now, strict=True)) if i not in (_REGISTERS, _OCCUPANCY))
