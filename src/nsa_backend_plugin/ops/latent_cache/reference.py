"""Torch reference of the latent cache."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import LATENT_TILE, MIN_AMAX, fp8_max
from nsa_backend_plugin.ops._torch.rotary import apply_rope
from nsa_backend_plugin.ops.indexer_prep.reference import normalize
from nsa_backend_plugin.ops.support import YES, Support

_FP8 = torch.float8_e4m3fn  # the packed layout exists on CUDA only


def available(arch: str) -> Support:
    return YES


def pack(kv: torch.Tensor, value_dim: int, tile_size: int = LATENT_TILE) -> torch.Tensor:
    """[N, d] -> uint8 [N, bytes]: fp8 values | fp32 scales | unquantized RoPE part."""
    tiles = kv[:, :value_dim].float().unflatten(1, (-1, tile_size))
    limit = fp8_max(_FP8)
    amax = tiles.abs().amax(dim=-1).clamp_min(MIN_AMAX)
    scale = amax / torch.full_like(amax, limit)  # a tensor: CUDA would multiply by the reciprocal of a number
    values = (tiles / scale[..., None]).clamp(-limit, limit).to(_FP8).flatten(1)
    parts = [values, scale, kv[:, value_dim:].contiguous()]
    return torch.cat([p.view(torch.uint8) for p in parts], dim=1)


def unpack(
    packed: torch.Tensor, value_dim: int, tile_size: int = LATENT_TILE, rope_dtype=torch.bfloat16
) -> torch.Tensor:
    """uint8 [N, bytes] -> float32 [N, d]."""
    scale_end = value_dim + 4 * (value_dim // tile_size)
    values = packed[:, :value_dim].contiguous().view(_FP8).float().unflatten(1, (-1, tile_size))
    scale = packed[:, value_dim:scale_end].contiguous().view(torch.float32)
    rope = packed[:, scale_end:].contiguous().view(rope_dtype).float()
    return torch.cat([(values * scale[..., None]).flatten(1), rope], dim=1)


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
