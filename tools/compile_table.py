"""The committed table of compiled kernels: one row per target and case, so that a change of kernels shows in review."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.compile_matrix import Result

_COUNTS = ("warps", "stages", "registers", "spill_bytes", "shared_bytes")
_COLUMNS = ("target", "kernel", *_COUNTS, "occupancy", "matrix_instructions", "source")
_WARPS, _REGISTERS, _OCCUPANCY, _SOURCE = map(_COLUMNS.index, ("warps", "registers", "occupancy", "source"))
#: Seen on gfx950: the same kernel got 12 or 17 registers, depending on what else the process had compiled before it.
REGISTER_SLACK = 8
_Key = tuple[str, str]


def _row(result: Result) -> tuple[str, ...]:
    return (
        result.target,
        f"{result.op}.{result.case}",
        *(str(getattr(result, name)) for name in _COUNTS),
        f"{result.occupancy:.3f}",
        " ".join(result.matrix_instructions),
        result.source,
    )


def _read(path: pathlib.Path) -> dict[_Key, tuple[str, ...]]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(row[0], row[1]): tuple(row) for row in list(csv.reader(file))[1:]}


def sources(path: pathlib.Path) -> dict[_Key, str]:
    """(target, operation.case) -> what the row's code was compiled from."""
    return {key: row[_SOURCE] for key, row in _read(path).items()}


def occupancies(path: pathlib.Path) -> dict[_Key, tuple[float, int]]:
    """(target, operation.case) -> (share of the warp slots that the row's programs fill, warps of a program)."""
    return {key: (float(row[_OCCUPANCY]), int(row[_WARPS])) for key, row in _read(path).items()}


def _of(results: Sequence[Result]) -> dict[_Key, tuple[str, ...]]:
    return {(row[0], row[1]): row for row in map(_row, results)}


def _scope(
    rows: Mapping[_Key, tuple[str, ...]], targets: Collection[str], ops: Sequence[str]
) -> dict[_Key, tuple[str, ...]]:
    return {k: row for k, row in rows.items() if k[0] in targets and k[1].split(".")[0] in ops}


def write(
    path: pathlib.Path,
    results: Sequence[Result],
    targets: Collection[str],
    ops: Sequence[str],
    sources: Mapping[_Key, str],
) -> None:
    """Put the results' rows in the place of older ones, and drop rows of the targets and operations that are no case.

    sources: (target, operation.case) -> fingerprint, of every case of the targets and operations.
    """
    kept = _read(path)
    for key in _scope(kept, targets, ops).keys() - sources.keys():
        del kept[key]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(row for _, row in sorted({**kept, **_of(results)}.items()))


def differences(
    path: pathlib.Path,
    results: Sequence[Result],
    targets: Collection[str],
    ops: Sequence[str],
    sources: Mapping[_Key, str],
) -> list[str]:
    """What the table's rows of the targets and operations have not, and what they have too much.

    A case without a result was not compiled: its row has to be of the present source. sources: as of `write`.
    """
    rows = _of(results)
    old = _scope(_read(path), targets, ops)
    lines = []
    for key in sorted(old.keys() | sources.keys()):
        before, now = old.get(key), rows.get(key)
        if key in sources and now is None:
            if before is None or before[_SOURCE] != sources[key]:
                lines.append(f"+ {' | '.join(key)}: of another source, or new")
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
