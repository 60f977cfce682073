"""Dense multi-head prefill: SGLang's own, with our concatenation of the key's two parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.model_executor.forward_context import get_attn_backend

from nsa_backend_plugin.engine import hooks
from nsa_backend_plugin.ops import concat


def concat_key(
    original: Callable[..., torch.Tensor],
    attn: Any,
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    forward_batch: Any,
) -> torch.Tensor:
    """AROUND hook of `_concat_and_cast_mha_k`: k [T, heads, 192] of k_nope [T, heads, 128] and k_pe [T, 1, 64]."""
    if not getattr(get_attn_backend(), "joins_prefill_keys", False):
        return original(attn, k_nope, k_pe, forward_batch)
    hooks.fired("prefill_key")
    return concat.mla_k(k_nope, k_pe)


def pack_chunk(k_nope: torch.Tensor, k_rope: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(k, v) of a chunk of cached prefix; SGLang asks the backend's `pack_prefix_chunk_kv`."""
    return concat.mla_k(k_nope, k_rope), v
