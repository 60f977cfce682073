"""AITER's fused RoPE + cache write (ROCm), for the key alone.

AITER also concatenates and rotates the query, which needs its unrotated part; `store` does not have that, so calls
with q_rope are declined. The key stands in for a query of one head, whose result is thrown away.
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
    q_rope: torch.Tensor | None,
    **_,
) -> Support:
    if q_rope is not None:
        return no("rotates the query only together with its other part")
    if positions is None:
        return no("always rotates")
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
    q_rope_out: torch.Tensor | None,
) -> None:
    from aiter.ops.triton.fused_kv_cache import fused_qk_rope_cat_and_cache_mla

    if k_nope.shape[0] == 0:
        return
    half = cos_sin_cache.shape[1] // 2
    nope, rope = k_nope[:, None], k_rope[:, None]
    scale = None if kv_scale is None else torch.full((1,), kv_scale, dtype=torch.float32, device=cache.device)
    fused_qk_rope_cat_and_cache_mla(
        nope,
        rope,
        nope,
        rope,
        cache,
        slots.contiguous(),
        positions,
        cos_sin_cache[:, :half],
        cos_sin_cache[:, half:],
        scale,
        is_neox,
        apply_scale=kind == "fp8",
        k_pe_out=None if k_rope_out is None else k_rope_out[:, None],
    )
