"""Triton kernels of the latent cache: pack rows to fp8, unpack them, and `store`, which does RoPE of key and query,
conversion and the cache write in one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_backend_plugin.layouts import FP8_DTYPES, LATENT_TILE, PACKED_FP8, packed_latent_bytes
from nsa_backend_plugin.ops._triton import early_launch
from nsa_backend_plugin.ops._triton.early_launch import await_predecessor
from nsa_backend_plugin.ops._triton.launch import launch
from nsa_backend_plugin.ops._triton.packed_rows import config, rope_ptr, row_constants, unpack
from nsa_backend_plugin.ops._triton.quant import declines_fp8, fp8_constants, scale_from_amax, to_fp8
from nsa_backend_plugin.ops._triton.support import available
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.latent_cache import Dequantize, Quantize, Store

__all__ = ["available", "declines_dequantize", "declines_quantize", "declines_store", "dequantize", "quantize", "store"]

_HEADS_PER_PROGRAM = 16


@triton.jit
def pack_values(
    x,
    row_ptr,  # [TOKENS * TILES, 1] start of each tile's packed row
    tile,  # [TOKENS * TILES, 1]
    keep,
    VALUE_DIM: tl.constexpr,
    TILE: tl.constexpr,
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
):
    """Quantize tiles x [TOKENS * TILES, TILE] fp32 and write their bytes and scales."""
    scale = scale_from_amax(tl.max(tl.abs(x), axis=1, keep_dims=True), FP8_MAX, False)
    value = to_fp8(x, scale, FP8, FP8_MAX, False)
    tl.store(row_ptr + tile * TILE + tl.arange(0, TILE)[None, :], value, mask=keep)
    tl.store((row_ptr + VALUE_DIM + 4 * tile).to(tl.pointer_type(tl.float32)), scale, mask=keep)


@triton.jit
def _quantize_kernel(
    kv_ptr,  # [rows, VALUE_DIM + ROPE]
    out_ptr,  # [rows, ROW_BYTES] uint8
    rows,
    kv_stride,
    VALUE_DIM: tl.constexpr,
    ROPE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    TILE: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_predecessor(EARLY)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK * TILES_BLOCK)[:, None]
    row, tile = first + index // TILES_BLOCK, index % TILES_BLOCK
    keep = (row < rows) & (tile < VALUE_DIM // TILE)
    source_ptr = kv_ptr + row * kv_stride + tile * TILE + tl.arange(0, TILE)[None, :]
    x = tl.load(source_ptr, mask=keep, other=0.0).to(tl.float32)
    pack_values(x, out_ptr + row * ROW_BYTES, tile, keep, VALUE_DIM, TILE, FP8, FP8_MAX)

    if ROPE:
        row = first + tl.arange(0, BLOCK)[:, None]
        dim = tl.arange(0, ROPE_BLOCK)[None, :]
        keep = (row < rows) & (dim < ROPE)
        rope = tl.load(kv_ptr + row * kv_stride + VALUE_DIM + dim, mask=keep)
        tl.store(rope_ptr(out_ptr, row, ROW_BYTES, ROPE, kv_ptr.dtype.element_ty) + dim, rope, mask=keep)


@triton.jit
def _rotate(
    row_ptr, token, inside, positions_ptr, positions_stride, cos_sin_ptr, ROPE: tl.constexpr, NEOX: tl.constexpr
):
    """Rows [N, ROPE] of row_ptr [N, 1], rotated by their tokens' positions, as (first, second) of each pair.

    A lane holds both values of its pairs, and all lanes have read before any returns, so the caller may write in place.
    """
    HALF: tl.constexpr = ROPE // 2
    pair = tl.arange(0, HALF)[None, :]
    if NEOX:
        first = tl.load(row_ptr + pair, mask=inside)
        second = tl.load(row_ptr + HALF + pair, mask=inside)
    else:
        both = tl.load(row_ptr + tl.arange(0, ROPE)[None, :], mask=inside)
        first, second = tl.split(tl.reshape(both, [both.shape[0], HALF, 2]))
    tl.debug_barrier()
    if positions_ptr is not None:
        position = tl.load(positions_ptr + token * positions_stride, mask=inside, other=0).to(tl.int64)
        cos = tl.load(cos_sin_ptr + position * ROPE + pair, mask=inside)
        sin = tl.load(cos_sin_ptr + position * ROPE + HALF + pair, mask=inside)
        dtype = first.dtype
        first, second = first.to(tl.float32), second.to(tl.float32)
        first, second = (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)
    return first, second


@triton.jit
def _write_pairs(row_ptr, first, second, keep, ROPE: tl.constexpr, NEOX: tl.constexpr):
    """Store pairs [N, ROPE // 2] into rows [N, ROPE] in the order `_rotate` read them."""
    HALF: tl.constexpr = ROPE // 2
    if NEOX:
        pair = tl.arange(0, HALF)[None, :]
        tl.store(row_ptr + pair, first, mask=keep)
        tl.store(row_ptr + HALF + pair, second, mask=keep)
    else:
        both = tl.reshape(tl.join(first, second), [first.shape[0], ROPE])
        tl.store(row_ptr + tl.arange(0, ROPE)[None, :], both, mask=keep)


@triton.jit
def _scaled(x, scale, FP8: tl.constexpr, FP8_MAX: tl.constexpr):
    """Bytes of x / scale for a plain fp8 cache."""
    return to_fp8(x.to(tl.float32), tl.full(x.shape, 0.0, tl.float32) + scale, FP8, FP8_MAX, False)


@triton.jit
def _write_nope(
    nope_ptr,
    cache_ptr,
    slots_ptr,
    norm_weight_ptr,
    norm_eps,
    kv_scale,
    first_token,
    tokens,
    nope_stride,
    slots_stride,
    KIND: tl.constexpr,
    NOPE: tl.constexpr,
    ROW: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
):
    """Convert BLOCK tokens' unrotated parts, one tile to a matrix row, and write them into their slots."""
    TILES: tl.constexpr = NOPE // TILE
    index = tl.arange(0, BLOCK * TILES)[:, None]
    token, tile = first_token + index // TILES, index % TILES
    inside = token < tokens
    slot = tl.load(slots_ptr + token * slots_stride, mask=inside, other=-1).to(tl.int64)
    dim = tile * TILE + tl.arange(0, TILE)[None, :]
    x = tl.load(nope_ptr + token * nope_stride + dim, mask=inside, other=0.0)
    if norm_weight_ptr is not None:
        dtype = x.dtype
        x = x.to(tl.float32)
        squares = tl.sum(tl.reshape(tl.sum(x * x, axis=1), [BLOCK, TILES]), axis=1, keep_dims=True)
        inverse = tl.rsqrt(squares / NOPE + norm_eps)
        inverse = tl.reshape(tl.broadcast_to(inverse, [BLOCK, TILES]), [BLOCK * TILES, 1])
        x = (x * inverse * tl.load(norm_weight_ptr + dim).to(tl.float32)).to(dtype)
    row_ptr = cache_ptr + slot * ROW
    if KIND == "packed":
        x = x.to(tl.bfloat16).to(tl.float32)
        pack_values(x, row_ptr, tile, slot >= 0, NOPE, TILE, FP8, FP8_MAX)
    elif KIND == "fp8":
        tl.store(row_ptr + dim, _scaled(x, kv_scale, FP8, FP8_MAX), mask=slot >= 0)
    else:
        tl.store(row_ptr + dim, x.to(cache_ptr.dtype.element_ty), mask=slot >= 0)


@triton.jit
def _write_rope(
    x,
    y,
    row_ptr,
    keep,
    kv_scale,
    KIND: tl.constexpr,
    NEOX: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    ROW: tl.constexpr,
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
):
    """Convert the rotated pairs (x, y) and write them at the end of their cache rows."""
    if KIND == "packed":
        tail_ptr = (row_ptr + (ROW - 2 * ROPE)).to(tl.pointer_type(tl.bfloat16))
        _write_pairs(tail_ptr, x.to(tl.bfloat16), y.to(tl.bfloat16), keep, ROPE, NEOX)
    elif KIND == "fp8":
        x_bytes, y_bytes = _scaled(x, kv_scale, FP8, FP8_MAX), _scaled(y, kv_scale, FP8, FP8_MAX)
        _write_pairs(row_ptr + NOPE, x_bytes, y_bytes, keep, ROPE, NEOX)
    else:
        dtype: tl.constexpr = row_ptr.dtype.element_ty
        _write_pairs(row_ptr + NOPE, x.to(dtype), y.to(dtype), keep, ROPE, NEOX)


@triton.jit
def _rotate_query(
    q_ptr,
    out_ptr,
    positions_ptr,
    cos_sin_ptr,
    first_token,
    tokens,
    heads,
    q_stride_t,
    q_stride_h,
    out_stride_t,
    out_stride_h,
    positions_stride,
    ROPE: tl.constexpr,
    NEOX: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rotate BLOCK tokens' next HEADS query heads; program_id(1) counts groups of heads from 1."""
    index = tl.arange(0, BLOCK * HEADS)[:, None]
    token = first_token + index // HEADS
    head = (tl.program_id(1) - 1) * HEADS + index % HEADS
    inside = (token < tokens) & (head < heads)
    source_ptr = q_ptr + token * q_stride_t + head * q_stride_h
    x, y = _rotate(source_ptr, token, inside, positions_ptr, positions_stride, cos_sin_ptr, ROPE, NEOX)
    _write_pairs(out_ptr + token * out_stride_t + head * out_stride_h, x, y, inside, ROPE, NEOX)


@triton.jit
def _store_kernel(
    nope_ptr,  # [tokens, NOPE]
    rope_ptr,  # [tokens, ROPE]
    cache_ptr,  # [slots, ROW] bf16/fp16/fp32, or uint8
    slots_ptr,  # [tokens]
    positions_ptr,  # [tokens] or None
    cos_sin_ptr,  # [max_position, ROPE] fp32 or None
    k_rope_out_ptr,  # [tokens, ROPE] or None
    q_rope_ptr,  # [tokens, heads, ROPE] or None
    q_out_ptr,  # as q_rope_ptr
    norm_weight_ptr,  # [NOPE] or None
    norm_eps,
    kv_scale,
    tokens,
    heads,
    nope_stride,
    rope_stride,
    slots_stride,
    positions_stride,
    k_rope_out_stride,
    q_stride_t,
    q_stride_h,
    q_out_stride_t,
    q_out_stride_h,
    KIND: tl.constexpr,  # "bf16", "fp8" or "packed"
    NEOX: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    ROW: tl.constexpr,  # elements of a cache row
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens per program
    HEADS: tl.constexpr,  # query heads per program
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_predecessor(EARLY)
    first_token = tl.program_id(0).to(tl.int64) * BLOCK
    if tl.program_id(1) == 0:
        _write_nope(
            nope_ptr,
            cache_ptr,
            slots_ptr,
            norm_weight_ptr,
            norm_eps,
            kv_scale,
            first_token,
            tokens,
            nope_stride,
            slots_stride,
            KIND,
            NOPE,
            ROW,
            TILE,
            BLOCK,
            FP8,
            FP8_MAX,
        )
        token = first_token + tl.arange(0, BLOCK)[:, None]
        inside = token < tokens
        source_ptr = rope_ptr + token * rope_stride
        x, y = _rotate(source_ptr, token, inside, positions_ptr, positions_stride, cos_sin_ptr, ROPE, NEOX)
        if k_rope_out_ptr is not None:
            _write_pairs(k_rope_out_ptr + token * k_rope_out_stride, x, y, inside, ROPE, NEOX)
        slot = tl.load(slots_ptr + token * slots_stride, mask=inside, other=-1).to(tl.int64)
        _write_rope(x, y, cache_ptr + slot * ROW, slot >= 0, kv_scale, KIND, NEOX, NOPE, ROPE, ROW, FP8, FP8_MAX)
    elif q_rope_ptr is not None:
        _rotate_query(
            q_rope_ptr,
            q_out_ptr,
            positions_ptr,
            cos_sin_ptr,
            first_token,
            tokens,
            heads,
            q_stride_t,
            q_stride_h,
            q_out_stride_t,
            q_out_stride_h,
            positions_stride,
            ROPE,
            NEOX,
            BLOCK,
            HEADS,
        )


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _declines_packed(arch: str, value_dim: int, tile_size: int, row_bytes: int) -> Reason:
    if not is_power_of_two(tile_size):
        return f"tile_size {tile_size} is not a power of two"
    if value_dim % 4 or row_bytes % 4:
        return f"rows of {value_dim} values and {row_bytes} bytes leave scales off 4-byte boundaries"
    return declines_fp8(arch, PACKED_FP8)


def declines_quantize(call: Quantize) -> Reason:
    width = packed_latent_bytes(call.rows.shape[1], call.value_dim, call.tile_size, call.rows.element_size())
    return _declines_packed(call.arch, call.value_dim, call.tile_size, width)


def declines_dequantize(call: Dequantize) -> Reason:
    if call.rows.data_ptr() % 4:
        return "packed does not start at a 4-byte boundary"
    return _declines_packed(call.arch, call.value_dim, call.tile_size, call.rows.shape[1])


def quantize(call: Quantize) -> torch.Tensor:
    kv, out = call.rows, call.output()
    rows, dim = kv.shape
    if rows:
        block, warps = config(rows)
        launch(
            _quantize_kernel,
            (triton.cdiv(rows, block),),
            kv,
            out,
            rows,
            kv.stride(0),
            num_warps=warps,
            **row_constants(call.value_dim, call.tile_size, dim - call.value_dim, out.shape[1], block),
            **fp8_constants(PACKED_FP8),
            **early_launch.options(call.arch),
        )
    return call.shaped(out)


def dequantize(call: Dequantize) -> torch.Tensor:
    out = call.output()
    unpack(call.rows, out, call.value_dim, call.tile_size)
    return call.shaped(out)


def _config(tokens: int) -> tuple[int, int]:
    """(tokens per program, warps), as measured on an H200."""
    return (1, 1) if tokens <= 512 else (2, 1)


def declines_store(call: Store) -> Reason:
    nope, rope = call.k_nope.shape[1], call.k_rope.shape[1]
    if nope % LATENT_TILE or not is_power_of_two(nope // LATENT_TILE) or not is_power_of_two(rope) or rope < 2:
        return f"k_nope and k_rope are {nope} and {rope} wide, not a power of two times {LATENT_TILE} and one"
    if call.kind == "packed":
        if call.cache.data_ptr() % 4:
            return "cache does not start at a 4-byte boundary"
        return declines_fp8(call.arch, PACKED_FP8)
    return declines_fp8(call.arch, call.cache.dtype) if call.kind == "fp8" else None


def store(call: Store) -> None:
    tokens, nope = call.k_nope.shape
    if tokens == 0:
        return
    cache, positions, k_rope_out, q_rope = call.cache, call.positions, call.k_rope_out, call.q_rope
    q_rope_out = None if call.q_all is None else call.q_all[..., nope:]
    heads = 0 if q_rope is None else q_rope.shape[1]
    block, warps = _config(tokens)
    fp8_dtype = cache.dtype if call.kind == "fp8" else PACKED_FP8
    if cache.dtype in FP8_DTYPES:
        cache = cache.view(torch.uint8)
    launch(
        _store_kernel,
        (triton.cdiv(tokens, block), 1 + triton.cdiv(heads, _HEADS_PER_PROGRAM)),
        call.k_nope,
        call.k_rope,
        cache,
        call.slots,
        positions,
        call.cos_sin_cache,
        k_rope_out,
        q_rope,
        q_rope_out,
        call.norm_weight,
        call.norm_eps,
        call.kv_scale,
        tokens,
        heads,
        call.k_nope.stride(0),
        call.k_rope.stride(0),
        call.slots.stride(0),
        0 if positions is None else positions.stride(0),
        0 if k_rope_out is None else k_rope_out.stride(0),
        *((0, 0) if q_rope is None else q_rope.stride()[:2]),
        *((0, 0) if q_rope_out is None else q_rope_out.stride()[:2]),
        KIND=call.kind,
        NEOX=call.is_neox,
        NOPE=nope,
        ROPE=call.k_rope.shape[1],
        ROW=cache.shape[2],
        TILE=LATENT_TILE,
        BLOCK=block,
        HEADS=_HEADS_PER_PROGRAM,
        num_warps=warps,
        # Products of a rotation must round separately, as torch's do: a fused multiply-add would change cache bytes.
        enable_fp_fusion=False,
        **fp8_constants(fp8_dtype),
        **early_launch.options(call.arch),
    )
