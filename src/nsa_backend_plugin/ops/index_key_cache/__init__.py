"""The paged fp8 cache of the indexer's keys (index-K): write and read. Bytes: `layouts.py`."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import (
    FP8_DTYPES,
    INDEX_DIM,
    INDEX_LAYOUTS,
    INDEX_PAGE_SIZE,
    SCALE_FORMATS,
    index_page_bytes,
)
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops.arch import fp8_dtype as device_fp8_dtype
from nsa_backend_plugin.ops.registry import Operation

_store = Operation("index_key_cache", "store")
_gather = Operation("index_key_cache", "gather")


def check_cache(cache: torch.Tensor, layout: str, page_size: int) -> None:
    """Checks shared with every reader of the cache."""
    checks.choice("layout", layout, INDEX_LAYOUTS)
    checks.positive("page_size", page_size)
    checks.require(page_size % 16 == 0, "page_size", page_size, "a multiple of 16")
    checks.tensor("cache", cache, (None, index_page_bytes(page_size)), torch.uint8)
    checks.contiguous("cache", cache)
    checks.require(cache.data_ptr() % 4 == 0, "cache.data_ptr()", cache.data_ptr(), "4-byte alignment, for the scales")


def store(
    key: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    layout: str = "row_major",
    scale_format: str = "fp32",
    page_size: int = INDEX_PAGE_SIZE,
    fp8_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> None:
    """Quantize index keys to fp8, one scale per token, and write them into their slots.

    key: [T, 128] bf16, fp16 or fp32. cache: [pages, page_size*132] uint8, written in place.
    slots: [T] int32/int64; token t goes to page slots[t] // page_size, row slots[t] % page_size; negative = skip.
    layout: "row_major" or "preshuffled". scale_format: "fp32", or "ue8m0" (scale rounded up to a power of two).
    fp8_dtype: e4m3fn or e4m3fnuz; None = the device's own.
    Scale is max(amax, 1e-4) / fp8_max. Raises ValueError for bad shapes, dtypes, devices, names or slots.
    Source: DESIGN "Byte layouts"; DeepGEMM (row_major), AITER indexer_k_quant_and_cache (preshuffled).
    """
    check_cache(cache, layout, page_size)
    checks.choice("scale_format", scale_format, SCALE_FORMATS)
    checks.tensor("key", key, (None, INDEX_DIM), checks.FLOAT_DTYPES, cache.device)
    checks.inner_contiguous("key", key)
    checks.tensor("slots", slots, (key.shape[0],), checks.INT_DTYPES, cache.device)
    checks.index_range("slots", slots, -(2**62), cache.shape[0] * page_size)
    dtype = fp8_dtype or device_fp8_dtype(cache.device)
    checks.choice("fp8_dtype", dtype, FP8_DTYPES)
    _store(
        impl,
        cache.device,
        {"tokens": key.shape[0], "layout": layout},
        key,
        cache,
        slots,
        layout=layout,
        scale_format=scale_format,
        page_size=page_size,
        fp8_dtype=dtype,
    )


def gather(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    layout: str = "row_major",
    page_size: int = INDEX_PAGE_SIZE,
    total_tokens: int | None = None,
    fp8_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the first seq_lens[b] keys of every request, in request order, then position order.

    cache: [pages, page_size*132] uint8. block_table: [B, max_pages] int32. seq_lens: [B] int32/int64.
    total_tokens: sum of seq_lens when the caller knows it (None reads it back from the device).
    Returns (k [S, 128] fp8, scale [S] fp32), S = sum of seq_lens.
    Raises ValueError for bad shapes, dtypes, devices or names, and on CPU for pages out of range.
    """
    check_cache(cache, layout, page_size)
    checks.tensor("block_table", block_table, (None, None), torch.int32, cache.device)
    checks.tensor("seq_lens", seq_lens, (block_table.shape[0],), checks.INT_DTYPES, cache.device)
    checks.index_range("seq_lens", seq_lens, 0, block_table.shape[1] * page_size + 1)
    dtype = fp8_dtype or device_fp8_dtype(cache.device)
    checks.choice("fp8_dtype", dtype, FP8_DTYPES)
    if total_tokens is None:
        total_tokens = int(seq_lens.sum())
    checks.require(total_tokens >= 0, "total_tokens", total_tokens, "at least 0")
    return _gather(
        impl,
        cache.device,
        {"tokens": total_tokens, "layout": layout},
        cache,
        block_table,
        seq_lens,
        layout=layout,
        page_size=page_size,
        total_tokens=total_tokens,
        fp8_dtype=dtype,
    )
