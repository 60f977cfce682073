"""AITER's MLA decode over selected slots, bf16 or plain fp8 rows: missing slots are compacted away first.

Checked against a fake, not run on AMD.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES
from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops._vendor import aiter_mla
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.sparse_mla import Attend

available = aiter_mla.available


def declines_attend(call: Attend) -> Reason:
    if call.kind == "packed" or call.kv.dtype not in (torch.bfloat16, *FP8_DTYPES):
        return f"kv is {call.kind} ({call.kv.dtype}): only bfloat16 and plain fp8 rows"
    if call.return_lse:
        return "return_lse: its log-sum-exp covers splits, not rows"
    if call.indices.shape[1] == 0:
        return "top-k 0"
    return aiter_mla.limits(call)


def attend(call: Attend) -> Result:
    valid, lengths = call.indices >= 0, call.lengths
    if lengths is None:
        starts = aiter_mla.starts(valid.sum(dim=1))
    else:
        starts = call.step.once("aiter starts", lambda: aiter_mla.starts(lengths), lengths)
    return aiter_mla.decode(call, aiter_mla.entries(call.indices, valid, starts), starts)
