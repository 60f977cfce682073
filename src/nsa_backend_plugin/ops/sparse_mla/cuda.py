"""Sparse MLA decode over packed fp8 rows, in CUDA C++."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._cuda import mla
from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.sparse_mla import Attend

CONFIGS = mla.configs_of(mla.PACKED, stages=2)


def available(arch: str) -> Reason:
    return mla.available(arch, CONFIGS)


def declines_attend(call: Attend) -> Reason:
    if call.kind != "packed":
        return f"kv is {call.kind}: only packed fp8 rows"
    return mla.declines(call)


def workspace_bytes_attend(device: torch.device, max_tokens: int, heads: int, topk: int, value_dim: int) -> int:
    return mla.workspace_bytes(device, CONFIGS, max_tokens, heads, value_dim)


def attend(call: Attend) -> Result:
    keys = call.indices.shape[1]
    return mla.attend(call, CONFIGS, call.indices, None, keys, leading=call.lengths is not None)
