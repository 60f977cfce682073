"""FlashInfer's radix top-k: any k, CUDA, slots only through a page table of page size 1."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._vendor import flashinfer as vendor
from nsa_backend_plugin.ops.arch import is_cuda
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.topk import Select


def available(arch: str) -> Reason:
    if not is_cuda(arch):
        return f"FlashInfer needs CUDA, not {arch}"
    return vendor.missing("flashinfer", "top_k_page_table_transform", "top_k_ragged_transform")


def declines_select(call: Select) -> Reason:
    if call.deterministic:
        return "its deterministic mode does not sort rows by index"
    if call.row_starts is not None:
        return "row_starts: its page tables are indexed from the start of the logits row"
    if call.page_table is not None and call.page_size != 1:
        return f"page size {call.page_size}: page tables of page size 1 only"
    if not call.logits.is_contiguous() or (call.page_table is not None and not call.page_table.is_contiguous()):
        return "logits or page_table not contiguous"
    return None if call.logits.shape[0] else "no rows"


def select(call: Select) -> torch.Tensor:
    import flashinfer

    # dsa_graph_safe: the other paths choose their launch from the lengths, which a captured graph would freeze.
    if call.page_table is None:
        result = flashinfer.top_k_ragged_transform(
            call.logits, torch.zeros_like(call.lengths), call.lengths, call.k, dsa_graph_safe=True
        )
    else:
        result = flashinfer.top_k_page_table_transform(
            call.logits, call.page_table, call.lengths, call.k, row_to_batch=call.page_rows, dsa_graph_safe=True
        )
    return call.out.copy_(result)
