"""Triton kernels of the index-K cache: quantize and store, gather."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from nsa_backend_plugin.layouts import INDEX_DIM, INDEX_LAYOUTS, INDEX_PAGE_SIZE, SCALE_FORMATS
from nsa_backend_plugin.ops._triton.quant import accepts_fp8, arch_fp8_dtype, fp8_constants, scale_from_amax, to_fp8
from nsa_backend_plugin.ops._triton.support import CompileCase, available, has_e4m3
from nsa_backend_plugin.ops.support import Support

__all__ = ["accepts_store", "available", "compile_cases", "gather", "store", "store_rows"]

_DIM = tl.constexpr(INDEX_DIM)


@triton.jit
def _value_offsets(token, PRESHUFFLED: tl.constexpr):
    """Byte offsets [tokens, 128] of the values of a page's tokens (`layouts.index_value_offsets`)."""
    token = token[:, None]
    dim = tl.arange(0, _DIM)[None, :]
    if PRESHUFFLED:
        return (token // 16) * (16 * _DIM) + (dim // 16) * 256 + (token % 16) * 16 + dim % 16
    return token * _DIM + dim


@triton.jit
def store_rows(
    x,
    slot,
    cache_ptr,
    PAGE_SIZE: tl.constexpr,
    PRESHUFFLED: tl.constexpr,
    UE8M0: tl.constexpr,
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
):
    """Quantize rows x [tokens, 128] fp32 and write them into their slots [tokens] int64; negative = skip."""
    scale = scale_from_amax(tl.max(tl.abs(x), axis=1), FP8_MAX, UE8M0)
    value = to_fp8(x, scale[:, None], FP8, FP8_MAX, UE8M0)
    keep = slot >= 0
    token = (slot % PAGE_SIZE).to(tl.int32)
    page_ptr = cache_ptr + (slot // PAGE_SIZE) * (PAGE_SIZE * (_DIM + 4))
    tl.store(page_ptr[:, None] + _value_offsets(token, PRESHUFFLED), value, mask=keep[:, None])
    scale_ptr = (page_ptr + PAGE_SIZE * _DIM + 4 * token).to(tl.pointer_type(tl.float32))
    tl.store(scale_ptr, scale, mask=keep)


@triton.jit
def _store_kernel(
    key_ptr,  # [tokens, 128]
    cache_ptr,  # [pages, PAGE_SIZE * 132] uint8
    slots_ptr,  # [tokens]
    tokens,
    key_stride,
    slots_stride,
    PAGE_SIZE: tl.constexpr,
    PRESHUFFLED: tl.constexpr,
    UE8M0: tl.constexpr,
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    slot = tl.load(slots_ptr + token * slots_stride, mask=inside, other=-1).to(tl.int64)
    dim = tl.arange(0, _DIM)[None, :]
    x = tl.load(key_ptr + token[:, None] * key_stride + dim, mask=inside[:, None], other=0.0).to(tl.float32)
    store_rows(x, slot, cache_ptr, PAGE_SIZE, PRESHUFFLED, UE8M0, FP8, FP8_MAX)


@triton.jit
def _gather_kernel(
    cache_ptr,  # [pages, PAGE_SIZE * 132] uint8
    table_ptr,  # [batch, max_pages] int32
    lens_ptr,  # [batch]
    value_ptr,  # [total, 128] uint8
    scale_ptr,  # [total] fp32
    batch,
    total,
    table_stride_b,
    table_stride_p,
    lens_stride,
    PAGE_SIZE: tl.constexpr,
    PRESHUFFLED: tl.constexpr,
    BLOCK: tl.constexpr,
    BATCH: tl.constexpr,
):
    # Program p copies the p-th block of BLOCK tokens, counting every request's last, partial block as one.
    program = tl.program_id(0)
    request = tl.arange(0, BATCH)
    lens = tl.load(lens_ptr + request * lens_stride, mask=request < batch, other=0).to(tl.int64)
    blocks = (lens + BLOCK - 1) // BLOCK
    past = tl.cumsum(blocks, axis=0) <= program  # requests that end before this program's block
    mine = tl.sum(past.to(tl.int32))
    if mine < batch:
        first = (program - tl.sum(tl.where(past, blocks, 0))) * BLOCK  # position of the block in its request
        length = tl.load(lens_ptr + mine * lens_stride).to(tl.int64)
        page = tl.load(table_ptr + mine.to(tl.int64) * table_stride_b + (first // PAGE_SIZE) * table_stride_p)
        page_ptr = cache_ptr + page.to(tl.int64) * (PAGE_SIZE * (_DIM + 4))

        position = first + tl.arange(0, BLOCK)
        token = (position % PAGE_SIZE).to(tl.int32)
        row = tl.sum(tl.where(past, lens, 0)) + position
        inside = (position < length) & (row < total)
        value = tl.load(page_ptr + _value_offsets(token, PRESHUFFLED), mask=inside[:, None])
        tl.store(value_ptr + row[:, None] * _DIM + tl.arange(0, _DIM)[None, :], value, mask=inside[:, None])
        page_scale_ptr = (page_ptr + PAGE_SIZE * _DIM).to(tl.pointer_type(tl.float32))
        tl.store(scale_ptr + row, tl.load(page_scale_ptr + token, mask=inside), mask=inside)


def _store_config(tokens: int) -> tuple[int, int]:
    """(tokens per program, warps): one warp per few tokens while programs are fewer than the GPU has room for."""
    return (2, 1) if tokens <= 1024 else (16, 4)


def _gather_config(batch: int, page_size: int) -> tuple[int, int, int]:
    """(tokens per program, padded batch, warps). A block never leaves its page: it divides the page size."""
    block = min(page_size & -page_size, 64)
    return block, max(16, triton.next_power_of_2(batch)), 4


def accepts_store(key: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, *, fp8_dtype, **_) -> Support:
    return accepts_fp8(cache.device, fp8_dtype)


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
    tokens = key.shape[0]
    if tokens == 0:
        return
    block, warps = _store_config(tokens)
    _store_kernel[(triton.cdiv(tokens, block),)](
        key,
        cache,
        slots,
        tokens,
        key.stride(0),
        slots.stride(0),
        PAGE_SIZE=page_size,
        PRESHUFFLED=layout == "preshuffled",
        UE8M0=scale_format == "ue8m0",
        BLOCK=block,
        num_warps=warps,
        **fp8_constants(fp8_dtype),
    )


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
    value = torch.empty(total_tokens, INDEX_DIM, dtype=torch.uint8, device=cache.device)
    scale = torch.empty(total_tokens, dtype=torch.float32, device=cache.device)
    batch = block_table.shape[0]
    if total_tokens:
        block, padded_batch, warps = _gather_config(batch, page_size)
        _gather_kernel[(total_tokens // block + batch,)](
            cache,
            block_table,
            seq_lens,
            value,
            scale,
            batch,
            total_tokens,
            block_table.stride(0),
            block_table.stride(1),
            seq_lens.stride(0),
            PAGE_SIZE=page_size,
            PRESHUFFLED=layout == "preshuffled",
            BLOCK=block,
            BATCH=padded_batch,
            num_warps=warps,
        )
    return value.view(fp8_dtype), scale


def compile_cases(arch: str) -> Iterator[CompileCase]:
    page_size = INDEX_PAGE_SIZE
    for layout in INDEX_LAYOUTS:
        for tokens in (64, 8192) if has_e4m3(arch) else ():
            for scale_format in SCALE_FORMATS:
                block, warps = _store_config(tokens)
                yield CompileCase(
                    f"store.{layout}.{scale_format}.T{tokens}",
                    _store_kernel,
                    dict(key_ptr="*bf16", cache_ptr="*u8", slots_ptr="*i64", tokens="i32")
                    | dict(key_stride="i32", slots_stride="i32"),
                    dict(PAGE_SIZE=page_size, PRESHUFFLED=layout == "preshuffled", UE8M0=scale_format == "ue8m0")
                    | dict(BLOCK=block, **fp8_constants(arch_fp8_dtype(arch))),
                    num_warps=warps,
                    divisible=("key_ptr", "cache_ptr", "slots_ptr", "key_stride"),
                )
        for batch in (1, 256):
            block, padded_batch, warps = _gather_config(batch, page_size)
            yield CompileCase(
                f"gather.{layout}.B{batch}",
                _gather_kernel,
                dict(cache_ptr="*u8", table_ptr="*i32", lens_ptr="*i32", value_ptr="*u8", scale_ptr="*fp32")
                | dict(batch="i32", total="i32", table_stride_b="i32", table_stride_p="i32", lens_stride="i32"),
                dict(PAGE_SIZE=page_size, PRESHUFFLED=layout == "preshuffled", BLOCK=block, BATCH=padded_batch),
                num_warps=warps,
                divisible=("cache_ptr", "table_ptr", "lens_ptr", "value_ptr", "scale_ptr"),
            )
