"""Packed fp8 latent rows in torch, byte by byte as `layouts` describes them, shared by the references."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import LATENT_TILE, PACKED_FP8, packed_rope_offset
from nsa_backend_plugin.ops._torch.quant import quantize_rows


def pack(kv: torch.Tensor, value_dim: int, tile_size: int = LATENT_TILE) -> torch.Tensor:
    """[N, d] -> uint8 [N, bytes]: fp8 values | fp32 scales | unquantized RoPE part."""
    values, scale = quantize_rows(kv[:, :value_dim].unflatten(1, (-1, tile_size)), "fp32", PACKED_FP8)
    parts = [values.flatten(1), scale, kv[:, value_dim:].contiguous()]
    return torch.cat([p.view(torch.uint8) for p in parts], dim=1)


def unpack(
    packed: torch.Tensor,
    value_dim: int,
    tile_size: int = LATENT_TILE,
    rope_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """uint8 [N, bytes] -> float32 [N, d]."""
    rope = packed_rope_offset(value_dim, tile_size)
    values = _typed(packed[:, :value_dim], PACKED_FP8).float().unflatten(1, (-1, tile_size))
    scale = _typed(packed[:, value_dim:rope], torch.float32)
    return torch.cat([(values * scale[..., None]).flatten(1), _typed(packed[:, rope:], rope_dtype).float()], dim=1)


def _typed(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes [N, n] as values of another type. A copy: the bytes may lie at an address that does not suit the type."""
    rows, width = data.shape
    return data.flatten().clone().view(dtype).view(rows, width // dtype.itemsize)
