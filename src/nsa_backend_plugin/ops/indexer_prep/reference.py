"""Torch reference of the indexer's query and key preparation, in float32 throughout."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._torch.rotary import apply_leading_rope
from nsa_backend_plugin.ops._torch.rotary import hadamard as hadamard_transform
from nsa_backend_plugin.ops.index_key_cache import reference as index_key_cache
from nsa_backend_plugin.ops.support import YES, Support


def available(arch: str) -> Support:
    return YES


def rotate(
    x: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, is_neox: bool, hadamard: bool
) -> torch.Tensor:
    """RoPE on the leading dimensions of x [T, ..., 128], then Hadamard, in float32."""
    x = apply_leading_rope(x, cos_sin_cache[positions.long()], is_neox)
    return hadamard_transform(x) if hadamard else x


def normalize(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: str, eps: float) -> torch.Tensor:
    """LayerNorm or RMSNorm of x [T, N] in float32, as every reference that normalizes takes it."""
    x = x.float()
    if norm == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
    return x if bias is None else x + bias.float()


def query(
    q: torch.Tensor,
    head_gate: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    *,
    weight_scale: float,
    is_neox: bool,
    hadamard: bool,
    scale_format: str,
    q_fp8: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    rotated = rotate(q, positions, cos_sin_cache, is_neox, hadamard)
    value, scale = index_key_cache.quantize_rows(rotated, scale_format, q_fp8.dtype)
    q_fp8.copy_(value)
    weights.copy_(head_gate.float() * scale * weight_scale)


def key_store(
    key: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    is_neox: bool,
    norm: str,
    eps: float,
    hadamard: bool,
    layout: str,
    scale_format: str,
    page_size: int,
    fp8_dtype: torch.dtype,
) -> None:
    normalized = normalize(key, norm_weight, norm_bias, norm, eps)
    rotated = rotate(normalized, positions, cos_sin_cache, is_neox, hadamard)
    value, scale = index_key_cache.quantize_rows(rotated, scale_format, fp8_dtype)
    index_key_cache.write(value, scale, cache, slots, layout=layout, page_size=page_size)
