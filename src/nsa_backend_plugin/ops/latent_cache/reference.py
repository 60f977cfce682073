"""Torch reference of the latent cache."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import fp8_max
from nsa_backend_plugin.ops._torch.norm import normalize
from nsa_backend_plugin.ops._torch.packed_rows import pack, unpack
from nsa_backend_plugin.ops._torch.rotary import apply_rope
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.latent_cache import Dequantize, Quantize, Store


def available(arch: str) -> Reason:
    return None


def quantize(call: Quantize) -> torch.Tensor:
    return call.shaped(pack(call.rows, call.value_dim, call.tile_size))


def dequantize(call: Dequantize) -> torch.Tensor:
    return call.shaped(unpack(call.rows, call.value_dim, call.tile_size, call.dtype).to(call.dtype))


def store(call: Store) -> None:
    k_nope, k_rope, cache = call.k_nope, call.k_rope, call.cache
    if call.norm_weight is not None:
        k_nope = normalize(k_nope, call.norm_weight, None, "rms", call.norm_eps).to(k_nope.dtype)
    if call.positions is not None and call.cos_sin_cache is not None:
        cos_sin = call.cos_sin_cache[call.positions.long()]
        k_rope = apply_rope(k_rope, cos_sin, call.is_neox).to(k_rope.dtype)
        if call.q_rope is not None and call.q_all is not None:
            rotated = apply_rope(call.q_rope, cos_sin, call.is_neox)
            call.q_all[..., k_nope.shape[1] :].copy_(rotated.to(call.q_rope.dtype))
    if call.k_rope_out is not None:
        call.k_rope_out.copy_(k_rope)
    keep = call.slots >= 0
    kv = torch.cat([k_nope, k_rope], dim=1)[keep]
    slot = call.slots[keep].long()
    if call.kind == "packed":
        cache.view(torch.uint8)[slot, 0] = pack(kv.to(torch.bfloat16), k_nope.shape[1])
    elif call.kind == "fp8":
        assert call.kv_scale is not None
        limit = fp8_max(cache.dtype)
        scaled = kv.float() / torch.full_like(kv, call.kv_scale, dtype=torch.float32)
        cache.view(torch.uint8)[slot, 0] = scaled.clamp(-limit, limit).to(cache.dtype).view(torch.uint8)
    else:
        cache[slot, 0] = kv.to(cache.dtype)
