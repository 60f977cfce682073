"""Pages of the index-K cache in torch: their check, and reading and writing them for the references."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import (
    FP8_DTYPES,
    INDEX_DIM,
    INDEX_LAYOUTS,
    SCALE_FORMATS,
    index_page_bytes,
    index_scale_offset,
    index_value_offsets,
)
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops.arch import fp8_dtype as own_fp8_dtype


def check(cache: torch.Tensor, layout: str, page_size: int) -> None:
    """Refuse what is no index-K cache [pages, page_size*132] uint8, contiguous and 4-byte aligned for its scales."""
    checks.choice("layout", layout, INDEX_LAYOUTS)
    checks.positive("page_size", page_size)
    checks.require(page_size % 16 == 0, "page_size", page_size, "a multiple of 16")
    checks.tensor("cache", cache, (None, index_page_bytes(page_size)), torch.uint8)
    checks.contiguous("cache", cache)
    checks.require(cache.data_ptr() % 4 == 0, "cache.data_ptr()", cache.data_ptr(), "4-byte alignment, for the scales")


def check_write(
    key: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, layout: str, page_size: int, scale_format: str
) -> None:
    """The arguments of what quantizes keys [T, 128] and writes them into their slots [T]."""
    check(cache, layout, page_size)
    checks.choice("scale_format", scale_format, SCALE_FORMATS)
    checks.tensor("key", key, (None, INDEX_DIM), checks.FLOAT_DTYPES, cache.device)
    checks.inner_contiguous("key", key)
    checks.tensor("slots", slots, (key.shape[0],), checks.INT_DTYPES, cache.device)
    checks.index_range("slots", slots, -(2**62), cache.shape[0] * page_size)


def flavour(given: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The argument `fp8_dtype`: None is the device's own."""
    dtype = given or own_fp8_dtype(device)
    checks.choice("fp8_dtype", dtype, FP8_DTYPES)
    return dtype


def write(
    value: torch.Tensor,
    scale: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    layout: str,
    page_size: int,
) -> None:
    """Write quantized keys, value [T, 128] fp8 and scale [T] fp32, into their slots [T]; negative = skip."""
    keep = slots >= 0
    slot = slots[keep].long()
    page, token = slot // page_size, slot % page_size
    offsets = index_value_offsets(layout, page_size).to(cache.device)[token]
    cache[page[:, None], offsets] = value[keep].view(torch.uint8)
    scale_bytes = index_scale_offset(token[:, None], page_size, INDEX_DIM) + torch.arange(4, device=cache.device)
    cache[page[:, None], scale_bytes] = scale[keep].float().contiguous().view(torch.uint8).view(-1, 4)


def read(
    cache: torch.Tensor, slots: torch.Tensor, *, layout: str, page_size: int, fp8_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of the given slots [S] int64: (fp8 [S, 128], fp32 scale [S])."""
    page, token = slots // page_size, slots % page_size
    # Both layouts keep 16 values of a token together: far fewer pieces to gather than single bytes.
    pieces = index_value_offsets(layout, page_size).to(cache.device)[:, ::16] // 16
    values = cache[:, : page_size * INDEX_DIM].unflatten(1, (-1, 16))
    value = values[page[:, None], pieces[token]].flatten(1).view(fp8_dtype)
    return value, cache.view(torch.float32)[page, index_scale_offset(token, page_size, INDEX_DIM) // 4]
