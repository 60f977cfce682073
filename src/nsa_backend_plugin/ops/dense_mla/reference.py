"""Torch reference of dense MLA decode, in float32, one request at a time."""

from __future__ import annotations

from nsa_backend_plugin.ops._torch.mla import Result, result, softmax_attention
from nsa_backend_plugin.ops._torch.paging import row_slots
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.dense_mla import Decode


def available(arch: str) -> Reason:
    return None


def decode(call: Decode) -> Result:
    out, lse = call.output(), call.new_lse()
    for b, length in enumerate(call.seq_lens.tolist()):
        latent = call.kv[row_slots(call.block_table[b], length, call.page_size), 0].float() * call.kv_unit
        token_out, token_lse = softmax_attention(call.q[b], latent, call.softmax_scale, call.value_dim)
        out[b] = token_out.to(out.dtype)
        if lse is not None:
            lse[b] = token_lse
    return result(out, lse)
