"""Triton kernels of the latent cache: pack rows to fp8 and unpack them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_backend_plugin.layouts import PACKED_FP8, packed_latent_bytes
from nsa_backend_plugin.ops._triton import early_launch
from nsa_backend_plugin.ops._triton.early_launch import await_predecessor
from nsa_backend_plugin.ops._triton.launch import launch
from nsa_backend_plugin.ops._triton.packed_rows import config, rope_ptr, row_constants, unpack
from nsa_backend_plugin.ops._triton.quant import declines_fp8, fp8_constants, scale_from_amax, to_fp8
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.latent_cache import Dequantize, Quantize


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
