"""Torch reference of the latent cache."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import fp8_max
from nsa_backend_plugin.ops._torch.norm import normalize
from nsa_backend_plugin.ops._torch.packed_rows import pack, unpack
from nsa_backend_plugin.ops._torch.rotary import apply_rope
from nsa_backend_plugin.ops.support import YES, Support


def available(arch: str) -> Support:
    return YES


def quantize(kv: torch.Tensor, *, value_dim: int, tile_size: int, out: torch.Tensor) -> None:
    out.copy_(pack(kv, value_dim, tile_size))


def dequantize(packed: torch.Tensor, *, value_dim: int, tile_size: int, out: torch.Tensor) -> None:
    out.copy_(unpack(packed, value_dim, tile_size, out.dtype).to(out.dtype))


def store(
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    kind: str,
    positions: torch.Tensor | None,
    cos_sin_cache: torch.Tensor | None,
    is_neox: bool,
    kv_scale: float | None,
    k_rope_out: torch.Tensor | None,
    q_rope: torch.Tensor | None,
    q_all: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
) -> None:
    if norm_weight is not None:
        k_nope = normalize(k_nope, norm_weight, None, "rms", norm_eps).to(k_nope.dtype)
    if positions is not None and cos_sin_cache is not None:
        cos_sin = cos_sin_cache[positions.long()]
        k_rope = apply_rope(k_rope, cos_sin, is_neox).to(k_rope.dtype)
        if q_rope is not None and q_all is not None:
            q_all[..., k_nope.shape[1] :].copy_(apply_rope(q_rope, cos_sin, is_neox).to(q_rope.dtype))
    if k_rope_out is not None:
        k_rope_out.copy_(k_rope)
    keep = slots >= 0
    kv = torch.cat([k_nope, k_rope], dim=1)[keep]
    slot = slots[keep].long()
    if kind == "packed":
        cache.view(torch.uint8)[slot, 0] = pack(kv.to(torch.bfloat16), k_nope.shape[1])
    elif kind == "fp8":
        assert kv_scale is not None
        limit = fp8_max(cache.dtype)
        quantized = (
            (kv.float() / torch.full_like(kv, kv_scale, dtype=torch.float32)).clamp(-limit, limit).to(cache.dtype)
        )
        cache.view(torch.uint8)[slot, 0] = quantized.view(torch.uint8)
    else:
        cache[slot, 0] = kv.to(cache.dtype)
