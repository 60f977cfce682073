"""Triton kernels of the indexer's preparation: one launch for the query, one for the key."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_backend_plugin.layouts import INDEX_DIM
from nsa_backend_plugin.ops._triton import early_launch
from nsa_backend_plugin.ops._triton.early_launch import await_predecessor
from nsa_backend_plugin.ops._triton.index_pages import store_rows
from nsa_backend_plugin.ops._triton.launch import launch
from nsa_backend_plugin.ops._triton.quant import declines_fp8, fp8_constants, scale_from_amax, to_fp8
from nsa_backend_plugin.ops._triton.support import available
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.indexer_prep import KeyStore, Query

__all__ = ["available", "declines_key_store", "declines_query", "key_store", "query"]

# A row of 128 lies as 16 chunks of 8: a lane holds a chunk, 16 neighbouring lanes a row. Steps within a chunk stay in
# registers, steps between chunks are warp shuffles (`tl.gather` along the chunk axis), and shared memory stays unused.
_DIM = tl.constexpr(INDEX_DIM)
_CHUNK = tl.constexpr(8)
_CHUNKS = tl.constexpr(INDEX_DIM // 8)
_HADAMARD_SCALE = tl.constexpr(INDEX_DIM**-0.5)


@triton.jit
def _cos_sin(row_ptr, pair, rotated, HALF: tl.constexpr):
    """Cosines and sines of pairs [1, n] of the rows [N, 1]; 1 and 0 where nothing rotates."""
    cos_ptr = row_ptr + pair
    rotated = tl.broadcast_to(rotated, cos_ptr.shape)
    return tl.load(cos_ptr, mask=rotated, other=1.0), tl.load(cos_ptr + HALF, mask=rotated, other=0.0)


@triton.jit
def _rope(x, position, cos_sin_ptr, ROPE: tl.constexpr, NEOX: tl.constexpr):
    """Rotate the first ROPE dimensions of rows x [N, 128] fp32 by their positions [N]."""
    ROWS: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = ROPE // 2
    dim = tl.arange(0, _DIM)[None, :]
    row_ptr = cos_sin_ptr + position[:, None] * ROPE
    if NEOX:
        chunk = tl.arange(0, _CHUNKS)[None, :, None]
        half: tl.constexpr = HALF // _CHUNK
        partner_chunk = tl.where(chunk < half, chunk + half, chunk - half)
        partner_chunk = tl.where(chunk < 2 * half, partner_chunk, chunk)
        chunks = tl.reshape(x, [ROWS, _CHUNKS, _CHUNK])
        partner = tl.reshape(tl.gather(chunks, tl.broadcast_to(partner_chunk, chunks.shape), 1), [ROWS, _DIM])
        is_first = dim < HALF
        cos, sin = _cos_sin(row_ptr, dim % HALF, dim < ROPE, HALF)
    else:
        even, odd = tl.split(tl.reshape(x, [ROWS, _DIM // 2, 2]))
        partner = tl.reshape(tl.join(odd, even), [ROWS, _DIM])
        is_first = dim % 2 == 0
        pair = tl.arange(0, _DIM // 2)[None, :]
        cos, sin = _cos_sin(row_ptr, pair, pair < HALF, HALF)  # one load per pair, then repeated
        cos = tl.reshape(tl.join(cos, cos), [ROWS, _DIM])
        sin = tl.reshape(tl.join(sin, sin), [ROWS, _DIM])
    return x * cos + partner * tl.where(is_first, -sin, sin)


@triton.jit
def _butterfly_in_chunk(x, STEP: tl.constexpr):
    """Hadamard step between elements STEP apart, STEP < 8: both are in one lane."""
    ROWS: tl.constexpr = x.shape[0]
    pairs = tl.reshape(x, [ROWS, _DIM // (2 * STEP), 2, STEP])
    a, b = tl.split(tl.permute(pairs, [0, 1, 3, 2]))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [ROWS, _DIM])


@triton.jit
def _butterfly_across_chunks(chunks, STEP: tl.constexpr):
    """Hadamard step between chunks STEP apart of [N, 16, 8]."""
    chunk = tl.arange(0, _CHUNKS)[None, :, None]
    partner = tl.gather(chunks, tl.broadcast_to(chunk ^ STEP, chunks.shape), 1)
    return tl.where((chunk & STEP) == 0, partner + chunks, partner - chunks)


@triton.jit
def _hadamard(x):
    """Orthonormal Walsh-Hadamard transform (Sylvester order) of rows x [N, 128] fp32."""
    ROWS: tl.constexpr = x.shape[0]
    x = _butterfly_in_chunk(x, 1)
    x = _butterfly_in_chunk(x, 2)
    x = _butterfly_in_chunk(x, 4)
    chunks = tl.reshape(x, [ROWS, _CHUNKS, _CHUNK])
    chunks = _butterfly_across_chunks(chunks, 1)
    chunks = _butterfly_across_chunks(chunks, 2)
    chunks = _butterfly_across_chunks(chunks, 4)
    chunks = _butterfly_across_chunks(chunks, 8)
    return tl.reshape(chunks, [ROWS, _DIM]) * _HADAMARD_SCALE


@triton.jit
def _query_kernel(
    q_ptr,  # [tokens, HEADS, 128]
    gate_ptr,  # [tokens, HEADS]
    positions_ptr,  # [tokens]
    cos_sin_ptr,  # [max_position, ROPE] fp32
    q_fp8_ptr,  # [tokens, HEADS, 128] uint8, contiguous
    weights_ptr,  # [tokens, HEADS] fp32, contiguous
    weight_scale,
    tokens,
    q_stride_t,
    q_stride_h,
    gate_stride,
    positions_stride,
    HEADS: tl.constexpr,
    ROPE: tl.constexpr,
    NEOX: tl.constexpr,
    HADAMARD: tl.constexpr,
    UE8M0: tl.constexpr,
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    BLOCK: tl.constexpr,  # (token, head) rows per program
    EARLY: tl.constexpr,
):
    await_predecessor(EARLY)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token, head = row // HEADS, row % HEADS
    inside = token < tokens
    dim = tl.arange(0, _DIM)[None, :]
    position = tl.load(positions_ptr + token * positions_stride, mask=inside, other=0).to(tl.int64)
    gate = tl.load(gate_ptr + token * gate_stride + head, mask=inside, other=0.0).to(tl.float32)
    q_row_ptr = q_ptr + token * q_stride_t + head * q_stride_h
    x = tl.load(q_row_ptr[:, None] + dim, mask=inside[:, None], other=0.0).to(tl.float32)
    x = _rope(x, position, cos_sin_ptr, ROPE, NEOX)
    if HADAMARD:
        x = _hadamard(x)
    scale = scale_from_amax(tl.max(tl.abs(x), axis=1), FP8_MAX, UE8M0)
    value = to_fp8(x, scale[:, None], FP8, FP8_MAX, UE8M0)
    tl.store(q_fp8_ptr + row[:, None] * _DIM + dim, value, mask=inside[:, None])
    tl.store(weights_ptr + row, gate * scale * weight_scale, mask=inside)


@triton.jit
def _key_kernel(
    key_ptr,  # [tokens, 128]
    weight_ptr,  # [128]
    bias_ptr,  # [128], or None for RMSNorm
    positions_ptr,  # [tokens]
    cos_sin_ptr,  # [max_position, ROPE] fp32
    cache_ptr,  # [pages, PAGE_SIZE * 132] uint8
    slots_ptr,  # [tokens]
    eps,
    tokens,
    key_stride,
    positions_stride,
    slots_stride,
    ROPE: tl.constexpr,
    NEOX: tl.constexpr,
    HADAMARD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRESHUFFLED: tl.constexpr,
    UE8M0: tl.constexpr,
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens per program
    EARLY: tl.constexpr,
):
    await_predecessor(EARLY)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    dim = tl.arange(0, _DIM)[None, :]
    slot = tl.load(slots_ptr + token * slots_stride, mask=inside, other=-1).to(tl.int64)
    position = tl.load(positions_ptr + token * positions_stride, mask=inside, other=0).to(tl.int64)
    x = tl.load(key_ptr + token[:, None] * key_stride + dim, mask=inside[:, None], other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + dim).to(tl.float32)
    if bias_ptr is not None:
        x -= tl.sum(x, axis=1, keep_dims=True) / _DIM
    variance = tl.sum(x * x, axis=1, keep_dims=True) / _DIM
    x = x * tl.rsqrt(variance + eps) * weight
    if bias_ptr is not None:
        x += tl.load(bias_ptr + dim).to(tl.float32)
    x = _rope(x, position, cos_sin_ptr, ROPE, NEOX)
    if HADAMARD:
        x = _hadamard(x)
    store_rows(x, slot, cache_ptr, PAGE_SIZE, PRESHUFFLED, UE8M0, FP8, FP8_MAX)


def _config(rows: int) -> tuple[int, int]:
    """(rows per program, warps): two rows to a warp, the least work in sequence, until the GPU is full of warps."""
    if rows <= 1024:
        return 2, 1
    return (8, 4) if rows <= 4096 else (16, 4)


def _declines(call: Query | KeyStore) -> Reason:
    rope_dim = call.cos_sin_cache.shape[1]
    if call.is_neox and rope_dim % (2 * _CHUNK.value):
        return f"neox rotation of {rope_dim} dimensions is not in halves of whole {_CHUNK.value}-element chunks"
    return declines_fp8(call.arch, call.fp8_dtype)


declines_query = _declines
declines_key_store = _declines


def query(call: Query) -> tuple[torch.Tensor, torch.Tensor]:
    q_fp8, weights = call.output()
    tokens, heads, _ = call.q.shape
    rows = tokens * heads
    if rows == 0:
        return q_fp8, weights
    block, warps = _config(rows)
    launch(
        _query_kernel,
        (triton.cdiv(rows, block),),
        call.q,
        call.head_gate,
        call.positions,
        call.cos_sin_cache,
        q_fp8.view(torch.uint8),
        weights,
        call.weight_scale,
        tokens,
        call.q.stride(0),
        call.q.stride(1),
        call.head_gate.stride(0),
        call.positions.stride(0),
        HEADS=heads,
        ROPE=call.cos_sin_cache.shape[1],
        NEOX=call.is_neox,
        HADAMARD=call.hadamard,
        UE8M0=call.scale_format == "ue8m0",
        BLOCK=block,
        num_warps=warps,
        **fp8_constants(call.fp8_dtype),
        **early_launch.options(call.arch),
    )
    return q_fp8, weights


def key_store(call: KeyStore) -> None:
    tokens = call.key.shape[0]
    if tokens == 0:
        return
    block, warps = _config(tokens)
    launch(
        _key_kernel,
        (triton.cdiv(tokens, block),),
        call.key,
        call.norm_weight,
        call.norm_bias,
        call.positions,
        call.cos_sin_cache,
        call.cache,
        call.slots,
        call.eps,
        tokens,
        call.key.stride(0),
        call.positions.stride(0),
        call.slots.stride(0),
        ROPE=call.cos_sin_cache.shape[1],
        NEOX=call.is_neox,
        HADAMARD=call.hadamard,
        PAGE_SIZE=call.page_size,
        PRESHUFFLED=call.layout == "preshuffled",
        UE8M0=call.scale_format == "ue8m0",
        BLOCK=block,
        num_warps=warps,
        **fp8_constants(call.fp8_dtype),
        **early_launch.options(call.arch),
    )
