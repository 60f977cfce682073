"""AITER's MLA decode over whole contexts, bf16 or fp8 rows, page size 1. Checked against a fake, not run on AMD."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops._vendor import aiter_mla
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.dense_mla import Decode

available = aiter_mla.available


def declines_decode(call: Decode) -> Reason:
    if call.page_size != 1:
        return f"page_size {call.page_size}: only 1"
    if call.return_lse:
        return "return_lse: its log-sum-exp covers splits, not rows"
    if call.num_kv_splits is not None:
        return "num_kv_splits is given: it chooses the splits itself"
    if call.block_table.shape[1] == 0:
        return "block_table has no pages"
    return aiter_mla.limits(call)


def decode(call: Decode) -> Result:
    table, lengths = call.block_table, call.seq_lens

    def ragged() -> tuple[torch.Tensor, torch.Tensor]:
        used = torch.arange(table.shape[1], device=table.device) < lengths[:, None]
        starts = aiter_mla.starts(lengths)
        return aiter_mla.entries(table, used, starts), starts

    return aiter_mla.decode(call, *call.step.once("aiter ragged", ragged, table, lengths))
