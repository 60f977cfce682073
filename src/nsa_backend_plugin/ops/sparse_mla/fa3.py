"""FlashAttention 3 (sgl_kernel) over bf16 rows: the selected slots as a page table of page size 1.

FA3 reads a prefix of each page-table row. With `lengths` the indices are one. Without, missing slots may stand
anywhere and are first sorted behind the others; that sort costs more than the attention of a small batch.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops._vendor import fa3, mla
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.sparse_mla import Attend

available = fa3.available


def declines_attend(call: Attend) -> Reason:
    if call.kv.dtype != torch.bfloat16:
        return f"kv is {call.kind} ({call.kv.dtype}): only bfloat16 rows"
    if call.indices.shape[1] == 0:
        return "top-k 0"
    return mla.limits(call)


def attend(call: Attend) -> Result:
    if call.lengths is not None:
        return fa3.decode(call, call.indices, call.lengths, 1, 0, shared=True)
    page_table, lengths = _compact(call.indices)
    return fa3.decode(call, page_table, lengths, 1, 0, shared=False)


def _compact(indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Valid slots of each row moved to its front: (indices [T, K], counts [T] int32). Entries past a count are 0.

    Descending order does it: a missing slot is -1, and attention does not depend on the order of keys.
    """
    counts = (indices >= 0).sum(dim=1, dtype=torch.int32)
    return indices.sort(dim=1, descending=True).values.clamp_min(0), counts
