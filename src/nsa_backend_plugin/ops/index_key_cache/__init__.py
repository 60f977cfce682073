"""The paged fp8 cache of the indexer's keys (index-K): write and read. Bytes: `layouts.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nsa_backend_plugin.layouts import INDEX_DIM, INDEX_PAGE_SIZE
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops._torch import index_pages
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.call import Call, Fact, Step
from nsa_backend_plugin.ops.dispatch import operation


@dataclass(slots=True, eq=False, kw_only=True)
class Store(Call[None]):
    """The arguments of `store`."""

    key: torch.Tensor
    cache: torch.Tensor
    slots: torch.Tensor
    layout: str
    scale_format: str
    page_size: int
    fp8_dtype: torch.dtype

    def facts(self) -> Mapping[str, Fact]:
        return {
            "tokens": self.key.shape[0],
            "dtype": str(self.key.dtype),
            "layout": self.layout,
            "scale_format": self.scale_format,
            "page_size": self.page_size,
        }


@dataclass(slots=True, eq=False, kw_only=True)
class Gather(Call[tuple[torch.Tensor, torch.Tensor]]):
    """The arguments of `gather`."""

    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    layout: str
    page_size: int
    total_tokens: int
    fp8_dtype: torch.dtype

    def facts(self) -> Mapping[str, Fact]:
        return {
            "tokens": self.total_tokens,
            "batch": self.block_table.shape[0],
            "layout": self.layout,
            "page_size": self.page_size,
        }

    def output(self) -> tuple[torch.Tensor, torch.Tensor]:
        """New (k [S, 128], scale [S])."""
        value = torch.empty(self.total_tokens, INDEX_DIM, dtype=self.fp8_dtype, device=self.cache.device)
        return value, torch.empty(self.total_tokens, dtype=torch.float32, device=self.cache.device)


@operation
def store(
    key: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    layout: str = "row_major",
    scale_format: str = "fp32",
    page_size: int = INDEX_PAGE_SIZE,
    fp8_dtype: torch.dtype | None = None,
    step: Step | None = None,
    impl: str | None = None,
) -> Store:
    """Quantize index keys to fp8, one scale per token, and write them into their slots.

    key: [T, 128] bf16, fp16 or fp32, rows strided freely. cache: [pages, page_size*132] uint8, written in place.
    slots: [T] int32/int64; token t goes to page slots[t] // page_size, row slots[t] % page_size; negative = skip.
    layout: "row_major" or "preshuffled". scale_format: "fp32", or "ue8m0" (scale rounded up to a power of two).
    fp8_dtype: e4m3fn or e4m3fnuz; None = the device's own.
    Scale is max(amax, 1e-4) / fp8_max. Returns None.
    Raises ValueError for bad shapes, dtypes, strides, devices or names, and on CPU for slots out of range.
    Source: DeepGEMM (row_major), AITER indexer_k_quant_and_cache (preshuffled).
    """
    index_pages.check_write(key, cache, slots, layout, page_size, scale_format)
    return Store(
        arch=device_arch(cache.device),
        step=step or Step(),
        impl=impl,
        key=key,
        cache=cache,
        slots=slots,
        layout=layout,
        scale_format=scale_format,
        page_size=page_size,
        fp8_dtype=index_pages.flavour(fp8_dtype, cache.device),
    )


@operation
def gather(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    layout: str = "row_major",
    page_size: int = INDEX_PAGE_SIZE,
    total_tokens: int | None = None,
    fp8_dtype: torch.dtype | None = None,
    step: Step | None = None,
    impl: str | None = None,
) -> Gather:
    """Read the first seq_lens[b] keys of every request, in request order, then position order.

    cache: [pages, page_size*132] uint8. block_table: [B, max_pages] int32, any strides; entries past a request's
    pages may hold anything. seq_lens: [B] int32/int64.
    total_tokens: sum of seq_lens when the caller knows it (None reads it back from the device).
    Returns (k [S, 128] fp8, scale [S] fp32), S = sum of seq_lens.
    Raises ValueError for bad shapes, dtypes, strides, devices or names, and on CPU for lengths or pages out of range
    and for another sum than total_tokens.
    """
    index_pages.check(cache, layout, page_size)
    checks.tensor("block_table", block_table, (None, None), torch.int32, cache.device)
    checks.tensor("seq_lens", seq_lens, (block_table.shape[0],), checks.INT_DTYPES, cache.device)
    checks.index_range("seq_lens", seq_lens, 0, block_table.shape[1] * page_size + 1)
    checks.used_pages("block_table", block_table, seq_lens, page_size, cache.shape[0])
    if total_tokens is None:
        total_tokens = int(seq_lens.sum())
    checks.require(isinstance(total_tokens, int) and total_tokens >= 0, "total_tokens", total_tokens, "at least 0")
    if seq_lens.is_cpu:
        checks.require(total_tokens == seq_lens.sum(), "total_tokens", total_tokens, "the sum of seq_lens")
    return Gather(
        arch=device_arch(cache.device),
        step=step or Step(),
        impl=impl,
        cache=cache,
        block_table=block_table,
        seq_lens=seq_lens,
        layout=layout,
        page_size=page_size,
        total_tokens=total_tokens,
        fp8_dtype=index_pages.flavour(fp8_dtype, cache.device),
    )
