"""FlashMLA's dense decode over bf16 pages of 64 tokens, any head count, on Hopper.

Of queries and rows that are both 1e4 large its result was 9.7e-6 from the reference's (cosine distance; H200, sglang
0.5.17's wheel): its rounding of the weights.
"""

from __future__ import annotations

from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops._vendor import flash_mla, mla
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.dense_mla import Decode


def available(arch: str) -> Reason:
    return flash_mla.missing() if arch == "sm_90" else f"FlashMLA's dense decode needs sm_90, not {arch}"


def declines_decode(call: Decode) -> Reason:
    if call.page_size != flash_mla.PAGE:
        return f"page_size {call.page_size}: only {flash_mla.PAGE}"
    if call.num_kv_splits is not None:
        return "num_kv_splits is given: its scheduler chooses the splits"
    if call.block_table.shape[1] == 0:
        return "block_table has no pages"
    if not call.block_table.is_contiguous():
        return f"block_table has strides {call.block_table.stride()}: only contiguous"
    return mla.unquantized_limits(call, flash_mla.PAGE)


def decode(call: Decode) -> Result:
    lengths = call.seq_lens
    out, lse = flash_mla.decode(
        call, call.q, lengths, (), block_table=call.block_table, cache_seqlens=lengths, is_fp8_kvcache=False
    )
    return mla.finish(call, out, lse, mla.no_length(call, lengths))
