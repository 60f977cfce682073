"""sgl_kernel's fast_topk: k 2048, CUDA, slots only through a page table of page size 1.

Only for forced calls and comparisons, and no row of `preferences.py` may name it: it returns wrong sets where thousands
of logits share the leading bits of the k-th largest. Seen on an H200 with sglang-kernel 0.4.5 on plateaus of equal
logits (which a ReLU makes), on logits of a narrow range, and on rows of a million. Shapes do not show it, so
`accepts_select` cannot decline such rows.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops.arch import is_cuda
from nsa_backend_plugin.ops.support import YES, Support, needs_module, no

_K = 2048


def available(arch: str) -> Support:
    if not is_cuda(arch):
        return no(f"sgl_kernel's top-k is built for CUDA, not {arch}")
    return needs_module("sgl_kernel")


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
    if k != _K:
        return no(f"k {k}: {_K} only")
    if deterministic:
        return no("no deterministic mode")
    if page_table is not None and page_size != 1:
        return no(f"page size {page_size}: page tables of page size 1 only")
    if page_table is not None and (page_rows is not None or row_starts is not None):
        return no("page_table with page_rows or row_starts: its row mapping differs")
    return YES if logits.shape[0] else no("no rows")


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
    import sgl_kernel  # noqa: F401  registers torch.ops.sgl_kernel

    # The operators below take the output; sgl_kernel's Python functions would allocate one and need a copy.
    if page_table is None:
        torch.ops.sgl_kernel.fast_topk(logits, out, lengths, row_starts)
        return
    first_row_of_request = torch.arange(logits.shape[0] + 1, dtype=torch.int32, device=logits.device)
    torch.ops.sgl_kernel.fast_topk_transform_fused(logits, lengths, out, page_table, first_row_of_request, None)
