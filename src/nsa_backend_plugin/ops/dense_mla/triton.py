"""Dense MLA decode in Triton: split-K over each context; lengths are read on the device only."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops._triton import mla_launch, support
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.dense_mla import Decode

available = support.available_for_large_tiles


def declines_decode(call: Decode) -> Reason:
    if call.num_kv_splits is not None and call.num_kv_splits > mla_launch.MAX_FORCED_SPLITS:
        return f"num_kv_splits={call.num_kv_splits}: at most {mla_launch.MAX_FORCED_SPLITS}"
    return mla_launch.declines(call, _kind(call))


def _kind(call: Decode) -> str:
    return "bf16" if call.kv_scale is None else "fp8"


def workspace_bytes_decode(
    device: torch.device, max_batch: int, heads: int, value_dim: int, num_kv_splits: int | None
) -> int:
    return mla_launch.workspace_bytes(device, max_batch, heads, value_dim, num_kv_splits)


def decode(call: Decode) -> Result:
    return mla_launch.attend(
        call,
        call.block_table,
        call.seq_lens,
        call.block_table.shape[1] * call.page_size,
        kind=_kind(call),
        page_size=call.page_size,
        splits=call.num_kv_splits,
    )
