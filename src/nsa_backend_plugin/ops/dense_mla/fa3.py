"""FlashAttention 3 (sgl_kernel) over bf16 pages, on Hopper.

With more than 64 heads it loads whole pages, and NaN past a sequence's end spreads: its weight is 0, and 0 * NaN is
NaN. Such calls need the promise `kv_is_finite`.
"""

from __future__ import annotations

from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops._vendor import fa3, mla
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.dense_mla import Decode

_MAX_HEADS = 64

available = fa3.available


def declines_decode(call: Decode) -> Reason:
    heads = call.q.shape[1]
    if heads > _MAX_HEADS and not call.kv_is_finite:
        return f"{heads} heads: with more than {_MAX_HEADS} it reads the last page past its length, see kv_is_finite"
    if call.block_table.shape[1] == 0:
        return "block_table has no pages"
    return mla.unquantized_limits(call, call.page_size)


def decode(call: Decode) -> Result:
    return fa3.decode(call, call.block_table, call.seq_lens, call.page_size, call.num_kv_splits or 0, shared=True)
