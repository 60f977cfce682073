"""SGLang's JIT top-k v2 (sglang.kernels, deepseek_v4/topk_v2.cuh): decode rows, page tables, k up to 2048, CUDA.

Its plan (which rows get a cluster of blocks) depends on the lengths only; SGLang makes it once per step, `select` once
per call. The benchmarks time `run` with a plan made outside.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops.arch import is_cuda
from nsa_backend_plugin.ops.support import YES, Support, no

_MAX_K = 2048
_FIRST_ARCH = 90  # thread-block clusters


def available(arch: str) -> Support:
    if not is_cuda(arch) or int(arch[3:]) < _FIRST_ARCH:
        return no(f"needs thread-block clusters (sm_{_FIRST_ARCH} or later), not {arch}")
    try:
        from sglang.kernels.ops.attention.dsv4 import topk  # noqa: F401
    except ImportError as error:
        return no(f"this SGLang has no top-k v2: {error}")
    return YES


def accepts_select(
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
) -> Support:
    if k > _MAX_K:
        return no(f"k {k}: at most {_MAX_K}")
    if deterministic:
        return no("no deterministic mode")
    if row_starts is not None or page_table is None or page_rows is not None:
        return no("needs a page table with one row per logits row, and no row_starts")
    if page_size & (page_size - 1):
        return no(f"page size {page_size}: a power of two only")
    if logits.stride(0) % 4 or logits.data_ptr() % 16:
        return no("logits rows do not start at 16-byte boundaries")
    return YES if logits.shape[0] else no("no rows")


def plan(lengths: torch.Tensor) -> torch.Tensor:
    """The plan of a step for lengths [R], which must not be negative."""
    from sglang.kernels.ops.attention.dsv4.topk import plan_topk_v2

    return plan_topk_v2(lengths)


def run(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    step_plan: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the slots of each row's largest logits, then -1, into out [R, k]. Arguments as in `ops.topk.select`."""
    from sglang.kernels.ops.attention.dsv4.topk import topk_transform_512_v2

    out.fill_(-1)
    topk_transform_512_v2(logits, lengths, page_table, out, page_size, step_plan)


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
    lengths = lengths.clamp_min(0)  # read as unsigned: a negative length would be four billion
    assert page_table is not None  # or `accepts_select` would have declined
    run(logits, lengths, page_table, page_size, plan(lengths), out)
