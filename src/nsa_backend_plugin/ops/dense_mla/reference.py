"""Torch reference of dense MLA decode, in float32, one request at a time."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops.sparse_mla.reference import softmax_attention
from nsa_backend_plugin.ops.support import YES, Support


def available(arch: str) -> Support:
    return YES


def decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    *,
    page_size: int,
    value_dim: int,
    num_kv_splits: int | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> None:
    for b, length in enumerate(seq_lens.tolist()):
        position = torch.arange(length, device=q.device)
        slots = block_table[b, position // page_size].long() * page_size + position % page_size
        token_out, token_lse = softmax_attention(q[b], kv[slots, 0].float(), softmax_scale, value_dim)
        out[b] = token_out.to(out.dtype)
        if lse is not None:
            lse[b] = token_lse
