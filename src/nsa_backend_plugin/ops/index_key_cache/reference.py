"""Torch reference of the index-K cache."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import INDEX_DIM, MIN_AMAX, fp8_max, index_value_offsets
from nsa_backend_plugin.ops.support import YES, Support


def available(arch: str) -> Support:
    return YES


def quantize_rows(x: torch.Tensor, scale_format: str, fp8_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., D] -> (fp8 [..., D], fp32 scale [...]) with scale = max(amax, 1e-4) / fp8_max, one per row."""
    x = x.float()
    limit = fp8_max(fp8_dtype)
    amax = x.abs().amax(dim=-1).clamp_min(MIN_AMAX)
    scale = amax / torch.full_like(amax, limit)  # a tensor: CUDA would multiply by the reciprocal of a number
    if scale_format == "ue8m0":
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2**exponent, 0.5 <= mantissa < 1
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return (x / scale[..., None]).clamp(-limit, limit).to(fp8_dtype), scale


def store(
    key: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    layout: str,
    scale_format: str,
    page_size: int,
    fp8_dtype: torch.dtype,
) -> None:
    value, scale = quantize_rows(key, scale_format, fp8_dtype)
    write(value, scale, cache, slots, layout=layout, page_size=page_size)


def write(
    value: torch.Tensor,
    scale: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    layout: str,
    page_size: int,
) -> None:
    """Write already quantized keys: value [T, 128] fp8, scale [T] fp32."""
    keep = slots >= 0
    slot = slots[keep].long()
    page, token = slot // page_size, slot % page_size
    offsets = index_value_offsets(layout, page_size).to(cache.device)[token]
    cache[page[:, None], offsets] = value[keep].view(torch.uint8)
    scale_bytes = page_size * value.shape[1] + 4 * token[:, None] + torch.arange(4, device=cache.device)
    cache[page[:, None], scale_bytes] = scale[keep].float().contiguous().view(torch.uint8).view(-1, 4)


def gather(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    layout: str,
    page_size: int,
    total_tokens: int,
    fp8_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    slots = [
        block_table[b, position // page_size].long() * page_size + position % page_size
        for b, length in enumerate(seq_lens.tolist())
        for position in [torch.arange(length, device=cache.device)]
    ]
    slot = torch.cat(slots) if slots else torch.empty(0, dtype=torch.long, device=cache.device)
    return read(cache, slot, layout=layout, page_size=page_size, fp8_dtype=fp8_dtype)


def read(
    cache: torch.Tensor, slots: torch.Tensor, *, layout: str, page_size: int, fp8_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of the given slots [S] int64: (fp8 [S, 128], fp32 scale [S])."""
    page, token = slots // page_size, slots % page_size
    # Both layouts keep 16 values of a token together: far fewer pieces to gather than single bytes.
    pieces = index_value_offsets(layout, page_size).to(cache.device)[:, ::16] // 16
    values = cache[:, : page_size * INDEX_DIM].unflatten(1, (-1, 16))
    value = values[page[:, None], pieces[token]].flatten(1).view(fp8_dtype)
    return value, cache.view(torch.float32)[page, page_size * INDEX_DIM // 4 + token]
