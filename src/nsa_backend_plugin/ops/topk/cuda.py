"""Top-k in CUDA C++: one launch, one read of the row in the common case (topk.cu says how)."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch

from nsa_backend_plugin.ops._cuda import jit
from nsa_backend_plugin.ops.arch import core_count, launches_early
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.topk import Select

_SOURCE = Path(__file__).with_name("topk.cu")
#: Rows beyond the number of multiprocessors share them two by two, in smaller blocks.
_THREADS_FEW_ROWS, _THREADS_MANY_ROWS = 1024, 512
#: Blocks that share a long row, by the multiprocessors that there are for each row. Rows for which no cluster is free
#: wait: an H200 (132 multiprocessors, 2026-11-21) holds 15 clusters of 8, 30 of 4 and 66 of 2, because a cluster lies
#: in one GPC, whose multiprocessors need not be a multiple of 8 or 4. So more than two blocks need some to spare.
#: In a trial there, us for one row and for 8 rows of 32k (128k): 8 blocks 7.9 and 8.5 (10.4, 11.3), 4 blocks 8.4 and
#: 8.9 (14.0, 15.4), 2 blocks 10.0 and 10.6 (17.5, 19.8), one block 12.0 and 12.6 (22.4, 23.9). 16 rows of 32k: 4 blocks
#: 9.2, 8 blocks, in two waves, 12.9. Rows of one tile gain nothing at 8k and under 1 us at 16k.
_CLUSTERS = {8: 10, 4: 5, 2: 2}
#: Wider rows may be long: topk.cu streams what exceeds one tile of registers.
_TILE = 16 * _THREADS_FEW_ROWS
MAX_K = 4096
#: Covers topk.cu's Shared: histogram, warp sums and scalars, candidates, chosen indices.
_SHARED_BYTES = 4 * 2048 + 256 + 8 * 8192 + 4 * MAX_K


def available(arch: str) -> Reason:
    return jit.compiles(_SOURCE, arch, _defines(_Variant(_THREADS_FEW_ROWS, 1, False)))


def declines_select(call: Select) -> Reason:
    return None if call.k <= MAX_K else f"k {call.k}: at most {MAX_K}"


class _Variant(NamedTuple):
    threads: int
    cluster: int  # blocks per row
    deterministic: bool


def _variant(arch: str, cores: int, rows: int, columns: int, deterministic: bool) -> _Variant:
    if rows > cores:
        return _Variant(_THREADS_MANY_ROWS, 1, deterministic)
    sharing = {} if columns <= _TILE else _clusters(arch)
    cluster = next((blocks for blocks, share in sharing.items() if rows * share <= cores), 1)
    return _Variant(_THREADS_FEW_ROWS, cluster, deterministic)


def _clusters(arch: str) -> dict[int, int]:
    """_CLUSTERS where the architecture has clusters: from sm_90 on."""
    return _CLUSTERS if int(arch[3:]) >= 90 else {}


def _defines(variant: _Variant) -> dict[str, int]:
    return {
        "THREADS": variant.threads,
        "CLUSTER": variant.cluster,
        "DETERMINISTIC": int(variant.deterministic),
        "MAX_K": MAX_K,
        "SHARED_BYTES": _SHARED_BYTES,
    }


def _variants(arch: str) -> list[_Variant]:
    """All that `_variant` can select."""
    clusters = (1, *_clusters(arch))
    return [
        _Variant(threads, cluster, deterministic)
        for threads, cluster in ((_THREADS_MANY_ROWS, 1), *((_THREADS_FEW_ROWS, c) for c in clusters))
        for deterministic in (False, True)
    ]


@functools.cache
def _kernels(arch: str) -> dict[_Variant, jit.Kernel]:
    """All variants at once: the first call loads what any later, captured call may need."""
    variants = _variants(arch)
    return dict(zip(variants, jit.load_all(_SOURCE, "topk", arch, list(map(_defines, variants))), strict=True))


def select(call: Select) -> torch.Tensor:
    logits, arch = call.logits, call.arch
    rows, columns = logits.shape
    if rows == 0:
        return call.out
    variant = _variant(arch, core_count(logits.device), rows, columns, call.deterministic)
    jit.launch(
        _kernels(arch)[variant],
        grid=(rows * variant.cluster, 1, 1),
        block=(variant.threads, 1, 1),
        args=(
            logits,
            call.lengths,
            call.row_starts,
            call.page_table,
            call.page_rows,
            call.out,
            ctypes.c_longlong(logits.stride(0)),
            ctypes.c_longlong(0 if call.page_table is None else call.page_table.stride(0)),
            call.k,
            call.page_size,
        ),
        shared_bytes=_SHARED_BYTES,
        pdl=launches_early(arch),
    )
    return call.out
