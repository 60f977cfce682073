"""Dense MLA decode over plain fp8 rows, in CUDA C++: the kernel of sparse decode over packed rows, fed by a page table.

Every group of 16 heads converts a row anew. With more heads that still takes less time than Triton's tiles, but more
than vendors' kernels over bf16 rows for more than a few requests (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._cuda import mla
from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.dense_mla import Decode

#: As for packed rows, whose tiles are a tenth larger.
CONFIGS = mla.configs_of(mla.PLAIN, stages=3)


def available(arch: str) -> Reason:
    return mla.available(arch, CONFIGS)


def declines_decode(call: Decode) -> Reason:
    if call.kv.dtype != torch.float8_e4m3fn:
        return f"kv is {call.kv.dtype}: only torch.float8_e4m3fn rows"
    if call.num_kv_splits is not None and call.num_kv_splits > mla.MOST_SPLITS:
        return f"num_kv_splits={call.num_kv_splits}: at most {mla.MOST_SPLITS}"
    return mla.declines(call)


def workspace_bytes_decode(
    device: torch.device, max_batch: int, heads: int, value_dim: int, num_kv_splits: int | None
) -> int:
    return mla.workspace_bytes(device, CONFIGS, max_batch, heads, value_dim, num_kv_splits)


def decode(call: Decode) -> Result:
    table, page_size = call.block_table, call.page_size
    keys = table.shape[1] * page_size
    return mla.attend(call, CONFIGS, table, call.seq_lens, keys, page_size=page_size, splits=call.num_kv_splits)
