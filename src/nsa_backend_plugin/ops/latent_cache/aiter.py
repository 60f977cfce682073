"""AITER's fused RoPE + concatenation + cache write (ROCm).

AITER writes whole query rows: it reads their first part from the buffer that it writes, where it stays as it is. A call
without a query passes the key as a query of one head, whose result is thrown away.
Checked against a fake, not run on AMD.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._vendor import probe
from nsa_backend_plugin.ops.arch import arch_fp8_dtype, is_rocm
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.latent_cache import Store

_MODULE, _FUNCTION = "aiter.ops.triton.fused_kv_cache", "fused_qk_rope_cat_and_cache_mla"


def available(arch: str) -> Reason:
    if not is_rocm(arch):
        return f"AITER is for ROCm, not {arch}"
    return probe.missing(_MODULE, _FUNCTION) or probe.missing_parameters(_MODULE, _FUNCTION, "apply_scale", "q_out")


def declines_store(call: Store) -> Reason:
    if call.norm_weight is not None:
        return "does not normalize"
    if call.positions is None:
        return "always rotates"
    if call.k_rope_out is not None:
        return "does not return the rotated key of tokens without a slot"
    if call.kind == "packed" or call.cache.dtype not in (torch.bfloat16, arch_fp8_dtype(call.arch)):
        return f"does not write {call.kind} caches of {call.cache.dtype}"
    return None


def store(call: Store) -> None:
    from aiter.ops.triton.fused_kv_cache import fused_qk_rope_cat_and_cache_mla

    if call.k_nope.shape[0] == 0:
        return
    assert call.positions is not None
    assert call.cos_sin_cache is not None
    value_dim, half = call.k_nope.shape[1], call.cos_sin_cache.shape[1] // 2
    nope, rope = call.k_nope[:, None], call.k_rope[:, None]
    q_nope, q_pe, q_out = nope, rope, None
    if call.q_rope is not None and call.q_all is not None and call.q_rope.shape[1] > 0:
        q_nope, q_pe, q_out = call.q_all[..., :value_dim], call.q_rope, call.q_all
    scale = None
    if call.kv_scale is not None and call.kv_scale != 1.0:
        scale = torch.full((1,), call.kv_scale, dtype=torch.float32, device=call.cache.device)
    fused_qk_rope_cat_and_cache_mla(
        q_nope,
        q_pe,
        nope,
        rope,
        call.cache,
        call.slots.contiguous(),
        call.positions.contiguous(),
        call.cos_sin_cache[:, :half],
        call.cos_sin_cache[:, half:],
        scale,
        call.is_neox,
        apply_scale=scale is not None,
        q_out=q_out,
    )
