"""Triton kernels of the index-K cache: quantize and store, gather."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_backend_plugin.layouts import INDEX_DIM
from nsa_backend_plugin.ops._triton.index_pages import scale_offset, store_rows, value_offsets
from nsa_backend_plugin.ops._triton.launch import launch
from nsa_backend_plugin.ops._triton.quant import declines_fp8, fp8_constants
from nsa_backend_plugin.ops._triton.support import available
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.index_key_cache import Gather, Store

__all__ = ["available", "declines_store", "gather", "store"]

_DIM = tl.constexpr(INDEX_DIM)


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
        value = tl.load(page_ptr + value_offsets(token, PRESHUFFLED), mask=inside[:, None])
        tl.store(value_ptr + row[:, None] * _DIM + tl.arange(0, _DIM)[None, :], value, mask=inside[:, None])
        page_scale_ptr = (page_ptr + scale_offset(0, PAGE_SIZE, _DIM)).to(tl.pointer_type(tl.float32))
        tl.store(scale_ptr + row, tl.load(page_scale_ptr + token, mask=inside), mask=inside)


def _store_config(tokens: int) -> tuple[int, int]:
    """(tokens per program, warps): one warp per few tokens while programs are fewer than the GPU has room for."""
    return (2, 1) if tokens <= 1024 else (16, 4)


def _gather_config(batch: int, page_size: int) -> tuple[int, int, int]:
    """(tokens per program, padded batch, warps). A block never leaves its page: it divides the page size."""
    block = min(page_size & -page_size, 64)
    return block, max(16, triton.next_power_of_2(batch)), 4


def declines_store(call: Store) -> Reason:
    return declines_fp8(call.arch, call.fp8_dtype)


def store(call: Store) -> None:
    tokens = call.key.shape[0]
    if tokens == 0:
        return
    block, warps = _store_config(tokens)
    launch(
        _store_kernel,
        (triton.cdiv(tokens, block),),
        call.key,
        call.cache,
        call.slots,
        tokens,
        call.key.stride(0),
        call.slots.stride(0),
        PAGE_SIZE=call.page_size,
        PRESHUFFLED=call.layout == "preshuffled",
        UE8M0=call.scale_format == "ue8m0",
        BLOCK=block,
        num_warps=warps,
        **fp8_constants(call.fp8_dtype),
    )


def gather(call: Gather) -> tuple[torch.Tensor, torch.Tensor]:
    value, scale = call.output()
    batch = call.block_table.shape[0]
    if call.total_tokens:
        block, padded_batch, warps = _gather_config(batch, call.page_size)
        launch(
            _gather_kernel,
            (call.total_tokens // block + batch,),
            call.cache,
            call.block_table,
            call.seq_lens,
            value.view(torch.uint8),
            scale,
            batch,
            call.total_tokens,
            call.block_table.stride(0),
            call.block_table.stride(1),
            call.seq_lens.stride(0),
            PAGE_SIZE=call.page_size,
            PRESHUFFLED=call.layout == "preshuffled",
            BLOCK=block,
            BATCH=padded_batch,
            num_warps=warps,
        )
    return value, scale
