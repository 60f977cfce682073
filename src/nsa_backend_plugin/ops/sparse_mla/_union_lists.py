"""Lists of the rows that groups of adjacent queries share: in CUDA C++, and in torch for Triton's interpreter."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from nsa_backend_plugin.ops._cuda import jit
from nsa_backend_plugin.ops.arch import launches_early
from nsa_backend_plugin.ops.call import Reason

_SOURCE = Path(__file__).with_name("union_lists.cu")
_THREADS = 512
_TABLE_BITS = 14
#: Rows of a union at most: half of the table. One more query's slots must find a place beside them.
MOST_ROWS = 1 << _TABLE_BITS - 1
MOST_SLOTS_OF_A_QUERY = (1 << _TABLE_BITS) - MOST_ROWS - 1


def most_slots(group: int) -> int:
    """Slots of a cache at most: an entry is a positive int32 with the bits of `group` owners."""
    return 1 << 31 - group


@dataclass(frozen=True)
class Lists:
    """What groups of adjacent queries share.

    entries: [groups, N] int32, slot << group | owners, bit j for the group's query j; padded to whole tiles with a row
    that nobody owns, undefined behind.
    counts: [groups] int32, rows of a union; 0 where a group's queries are computed alone.
    alone: [tokens] int32, keys of a query that is computed alone; -1 of the others.
    """

    entries: torch.Tensor
    counts: torch.Tensor
    alone: torch.Tensor


def available(arch: str) -> Reason:
    return jit.compiles(_SOURCE, arch, _defines(4))


def size(group: int, topk: int, tile: int, most_percent: int) -> tuple[int, int]:
    """(rows of a union at most, entries of its list with padding: a multiple of 16, so that lists stay aligned)."""
    most_rows = min(MOST_ROWS, group * topk * most_percent // 100)
    return most_rows, -(-most_rows // 64) * 64 + tile


def build(
    arch: str,
    indices: torch.Tensor,
    lengths: torch.Tensor | None,
    *,
    group: int,
    tile: int,
    most_percent: int,
) -> Lists:
    """Lists of the queries' slots indices [tokens, K], `group` queries each.

    tile: rows read at once. most_percent: that a union may be of all its queries' slots, to be shared. The lists are
    allocated here: at most most_percent of the indices' bytes, and padding for each group.
    """
    tokens, topk = indices.shape
    groups = -(-tokens // group)
    most_rows, stride = size(group, topk, tile, most_percent)
    make = functools.partial(torch.empty, dtype=torch.int32, device=indices.device)
    lists = Lists(make(groups, stride), make(groups), make(tokens))
    if arch == "cpu":
        _in_torch(lists, indices, lengths, group, tile, most_rows, most_percent)
        return lists
    arguments = _Arguments(
        indices=indices.data_ptr(),
        lengths=0 if lengths is None else lengths.data_ptr(),
        lists=lists.entries.data_ptr(),
        counts=lists.counts.data_ptr(),
        alone=lists.alone.data_ptr(),
        tokens=tokens,
        topk=topk,
        list_stride=stride,
        tile=tile,
        most_rows=most_rows,
        most_percent=most_percent,
    )
    jit.launch(
        _kernel(arch, group),
        (groups, 1, 1),
        (_THREADS, 1, 1),
        [arguments],
        shared_bytes=_shared_bytes(group),
        pdl=launches_early(arch),
        device=indices.device,
    )
    return lists


class _Arguments(ctypes.Structure):
    """`Arguments` of union_lists.cu, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("indices", "lengths", "lists", "counts", "alone")),
        *((name, ctypes.c_int) for name in ("tokens", "topk", "list_stride", "tile", "most_rows", "most_percent")),
    )


def _shared_bytes(group: int) -> int:
    """sizeof(Shared) of the source, which asserts it."""
    return 4 * ((1 << _TABLE_BITS) + 3 * group + _THREADS // 32 + 2)


def _defines(group: int) -> dict[str, object]:
    return {
        "GROUP": group,
        "THREADS": _THREADS,
        "TABLE_BITS": _TABLE_BITS,
        "SHARED_BYTES": _shared_bytes(group),
    }


@functools.cache
def _kernel(arch: str, group: int) -> jit.Kernel:
    return jit.load(_SOURCE, "union_lists", arch, _defines(group))


def _in_torch(
    lists: Lists,
    indices: torch.Tensor,
    lengths: torch.Tensor | None,
    group: int,
    tile: int,
    most_rows: int,
    most_percent: int,
) -> None:
    """What the kernel does, one group at a time."""
    tokens, topk = indices.shape
    for place, count in enumerate(lists.counts):
        first = place * group
        members = range(first, min(first + group, tokens))
        owners: dict[int, int] = {}
        entries, repeats = 0, False
        for token in members:
            length = topk if lengths is None else int(lengths[token])
            for slot in indices[token, :length].tolist():
                if slot >= 0:
                    bit = 1 << token - first
                    repeats |= bool(owners.get(slot, 0) & bit)
                    owners[slot] = owners.get(slot, 0) | bit
                    entries += 1
        share = 0 < len(owners) <= most_rows and not repeats and 100 * len(owners) <= entries * most_percent
        count.fill_(len(owners) if share else 0)
        for token in members:
            lists.alone[token] = -1 if share else topk if lengths is None else lengths[token]
        if share:
            union = [slot << group | bits for slot, bits in owners.items()]
            union += [union[0] >> group << group] * (-len(union) % tile)
            lists.entries[place, : len(union)] = torch.tensor(union, dtype=torch.int32)
