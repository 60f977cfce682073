"""FlashInfer's radix top-k: any k, CUDA, slots only through a page table of page size 1."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops.arch import is_cuda
from nsa_backend_plugin.ops.support import YES, Support, needs_module, no


def available(arch: str) -> Support:
    if not is_cuda(arch):
        return no(f"FlashInfer needs CUDA, not {arch}")
    support = needs_module("flashinfer")
    if not support.ok:
        return support
    import flashinfer

    if not hasattr(flashinfer, "top_k_page_table_transform"):
        return no(f"flashinfer {flashinfer.__version__} has no top_k_page_table_transform")
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
    if deterministic:
        return no("its deterministic mode does not sort rows by index")
    if row_starts is not None:
        return no("row_starts: its page tables are indexed from the start of the logits row")
    if page_table is not None and page_size != 1:
        return no(f"page size {page_size}: page tables of page size 1 only")
    if not logits.is_contiguous() or (page_table is not None and not page_table.is_contiguous()):
        return no("logits or page_table not contiguous")
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
    import flashinfer

    # dsa_graph_safe: the other paths choose their launch from the lengths, which a captured graph would freeze.
    if page_table is None:
        result = flashinfer.top_k_ragged_transform(
            logits, torch.zeros_like(lengths), lengths.contiguous(), k, dsa_graph_safe=True
        )
    else:
        result = flashinfer.top_k_page_table_transform(
            logits, page_table, lengths.contiguous(), k, row_to_batch=page_rows, dsa_graph_safe=True
        )
    out.copy_(result)
