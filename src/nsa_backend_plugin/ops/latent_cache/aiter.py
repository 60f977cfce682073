"""AITER's fused RoPE + concatenation + cache write (ROCm).

AITER writes whole query rows: it reads their first part from the buffer that it writes, where it stays as it is. A call
without a query passes the key as a query of one head, whose result is thrown away.
Checked against a fake, not run on AMD.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops.arch import fp8_dtype, is_rocm
from nsa_backend_plugin.ops.support import YES, Support, needs_module, no


def available(arch: str) -> Support:
    return needs_module("aiter") if is_rocm(arch) else no("AITER is ROCm only")


def accepts_store(
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    kind: str,
    positions: torch.Tensor | None,
    k_rope_out: torch.Tensor | None,
    norm_weight: torch.Tensor | None = None,
    **_,
) -> Support:
    if norm_weight is not None:
        return no("does not normalize")
    if positions is None:
        return no("always rotates")
    if k_rope_out is not None:
        return no("does not return the rotated key of tokens without a slot")
    if cache.dtype not in (torch.bfloat16, fp8_dtype(cache.device)) or kind == "packed":
        return no(f"does not write {kind} caches of {cache.dtype}")
    return YES


def store(
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    kind: str,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    kv_scale: float | None,
    k_rope_out: torch.Tensor | None,
    q_rope: torch.Tensor | None,
    q_all: torch.Tensor | None,
    **_: object,  # the norm, which accepts_store declines
) -> None:
    from aiter.ops.triton.fused_kv_cache import fused_qk_rope_cat_and_cache_mla

    tokens, value_dim = k_nope.shape
    if tokens == 0:
        return
    half = cos_sin_cache.shape[1] // 2
    nope, rope = k_nope[:, None], k_rope[:, None]
    q_nope, q_pe, q_out = nope, rope, None
    if q_rope is not None and q_all is not None and q_rope.shape[1] > 0:
        q_nope, q_pe, q_out = q_all[..., :value_dim], q_rope, q_all
    scale = None
    if kv_scale is not None and kv_scale != 1.0:
        scale = torch.full((1,), kv_scale, dtype=torch.float32, device=cache.device)
    fused_qk_rope_cat_and_cache_mla(
        q_nope,
        q_pe,
        nope,
        rope,
        cache,
        slots.contiguous(),
        positions,
        cos_sin_cache[:, :half],
        cos_sin_cache[:, half:],
        scale,
        is_neox,
        apply_scale=scale is not None,
        q_out=q_out,
    )
