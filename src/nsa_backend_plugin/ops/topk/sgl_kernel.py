"""sgl_kernel's fast_topk: k 2048, CUDA, slots only through a page table of page size 1.

Only for forced calls and comparisons, and no row of `preferences.py` may name it: it returns wrong sets where thousands
of logits share the leading bits of the k-th largest. Seen on an H200 with sglang-kernel 0.4.5 on plateaus of equal
logits (which a ReLU makes), on logits of a narrow range, and on rows of a million. Shapes do not show it, so
`declines_select` cannot decline such rows.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._vendor import probe
from nsa_backend_plugin.ops.arch import is_cuda
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.topk import Select

_K = 2048


def available(arch: str) -> Reason:
    if not is_cuda(arch):
        return f"sgl_kernel's top-k is built for CUDA, not {arch}"
    return probe.missing("sgl_kernel", "fast_topk", "fast_topk_transform_fused")


def declines_select(call: Select) -> Reason:
    if call.k != _K:
        return f"k {call.k}: {_K} only"
    if call.deterministic:
        return "no deterministic mode"
    if call.page_table is not None and call.page_size != 1:
        return f"page size {call.page_size}: page tables of page size 1 only"
    if call.page_table is not None and (call.page_rows is not None or call.row_starts is not None):
        return "page_table with page_rows or row_starts: its row mapping differs"
    return None if call.logits.shape[0] else "no rows"


def select(call: Select) -> torch.Tensor:
    logits, lengths = call.logits, call.lengths
    # The operators below take the output; sgl_kernel's Python functions would allocate one and need a copy.
    if call.page_table is None:
        torch.ops.sgl_kernel.fast_topk(logits, call.out, lengths, call.row_starts)
        return call.out
    first_row_of_request = torch.arange(logits.shape[0] + 1, dtype=torch.int32, device=logits.device)
    torch.ops.sgl_kernel.fast_topk_transform_fused(
        logits, lengths, call.out, call.page_table, first_row_of_request, None
    )
    return call.out
