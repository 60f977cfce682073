"""Torch reference of sparse MLA attention, in float32, one token at a time."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._torch.mla import Result, result, softmax_attention
from nsa_backend_plugin.ops._torch.packed_rows import unpack
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.sparse_mla import Attend


def available(arch: str) -> Reason:
    return None


def rows(kv: torch.Tensor, slots: torch.Tensor, kind: str, kv_scale: float | None, value_dim: int) -> torch.Tensor:
    """Latent rows of the given slots [K], dequantized to float32 [K, query_dim]."""
    picked = kv[slots.long(), 0]
    if kind == "packed":
        return unpack(picked.view(torch.uint8), value_dim)
    return picked.float() * (1.0 if kv_scale is None else kv_scale)


def attend(call: Attend) -> Result:
    out, lse = call.output(), call.new_lse()
    for t, selected in enumerate(call.indices):
        latent = rows(call.kv, selected[selected >= 0], call.kind, call.kv_scale, call.value_dim)
        token_out, token_lse = softmax_attention(call.q[t], latent, call.softmax_scale, call.value_dim)
        out[t] = token_out.to(out.dtype)
        if lse is not None:
            lse[t] = token_lse
    return result(out, lse)
