"""Top-k in CUDA C++: one launch, one read of the row in the common case (topk.cu says how)."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from nsa_backend_plugin.ops import cuda_jit
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.support import YES, Support, no

_SOURCE = Path(__file__).with_name("topk.cu")
#: Rows up to the number of multiprocessors have one each to themselves; beyond, two smaller blocks share one.
_THREADS_FEW_ROWS, _THREADS_MANY_ROWS = 1024, 512
MAX_K = 4096
#: Covers topk.cu's Shared: histogram, warp sums and scalars, candidates, chosen indices.
_SHARED_BYTES = 4 * 2048 + 256 + 8 * 8192 + 4 * MAX_K


def available(arch: str) -> Support:
    return cuda_jit.compiles(_SOURCE, arch, _defines(_THREADS_FEW_ROWS, False))


def accepts_select(logits: torch.Tensor, lengths: torch.Tensor, k: int, **kwargs: object) -> Support:
    return YES if k <= MAX_K else no(f"k {k}: at most {MAX_K}")


def _defines(threads: int, deterministic: bool) -> dict[str, int]:
    return {
        "THREADS": threads,
        "DETERMINISTIC": int(deterministic),
        "MAX_K": MAX_K,
        "SHARED_BYTES": _SHARED_BYTES,
    }


@functools.cache
def _kernels(arch: str) -> dict[tuple[int, bool], cuda_jit.Kernel]:
    """All variants at once: the first call loads what any later, captured call may need."""
    return {
        (threads, deterministic): cuda_jit.load(_SOURCE, ["topk"], arch, _defines(threads, deterministic))["topk"]
        for threads in (_THREADS_FEW_ROWS, _THREADS_MANY_ROWS)
        for deterministic in (False, True)
    }


@functools.cache
def _cores(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def select(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    *,
    row_starts: torch.Tensor | None,
    page_table: torch.Tensor | None,
    page_rows: torch.Tensor | None,
    page_size: int,
    deterministic: bool,
    out: torch.Tensor,
) -> None:
    rows = logits.shape[0]
    if rows == 0:
        return
    arch = device_arch(logits.device)
    threads = _THREADS_FEW_ROWS if rows <= _cores(logits.device) else _THREADS_MANY_ROWS
    cuda_jit.launch(
        _kernels(arch)[threads, deterministic],
        grid=(rows, 1, 1),
        block=(threads, 1, 1),
        args=(
            logits,
            lengths.contiguous(),
            None if row_starts is None else row_starts.contiguous(),
            page_table,
            None if page_rows is None else page_rows.contiguous(),
            out,
            ctypes.c_longlong(logits.stride(0)),
            ctypes.c_longlong(0 if page_table is None else page_table.stride(0)),
            k,
            page_size,
        ),
        shared_bytes=_SHARED_BYTES,
        pdl=int(arch[3:]) >= 90,
    )
