"""Torch reference of the weighted MQA logits, in float32."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._torch import index_pages
from nsa_backend_plugin.ops._torch.logits import row_lengths, weighted_logits
from nsa_backend_plugin.ops._torch.paging import row_slots
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.mqa_logits import Paged, Ragged


def available(arch: str) -> Reason:
    return None


def paged(call: Paged) -> torch.Tensor:
    q, page_size, out = call.q, call.page_size, call.output()
    batch, next_n = q.shape[:2]
    if call.clean:
        out.fill_(float("-inf"))
    lengths = row_lengths(call.context_lens, next_n)
    for b in range(batch):
        for j in range(next_n):
            length, row = int(lengths[b, j]), b * next_n + j
            slots = row_slots(call.block_table[b], length, page_size)
            k, scale = index_pages.read(call.cache, slots, layout=call.layout, page_size=page_size, fp8_dtype=q.dtype)
            out[row, :length] = weighted_logits(q[b, j : j + 1], k, scale, call.weights[row : row + 1])[0]
    return out


def ragged(call: Ragged) -> torch.Tensor:
    out = call.output()
    column = torch.arange(call.k.shape[0], device=out.device)
    inside = (column >= call.row_start[:, None]) & (column < call.row_end[:, None])
    logits = weighted_logits(call.q, call.k, call.k_scale, call.weights)
    # Without clean the other columns keep what was there, like a kernel that skips them.
    return out.copy_(torch.where(inside, logits, torch.full_like(logits, float("-inf")) if call.clean else out))
