"""Packed fp8 latent rows in Triton kernels: where their parts lie, and unpacking them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nsa_backend_plugin.layouts import LATENT_TILE, PACKED_FP8
from nsa_backend_plugin.ops._triton.launch import launch
from nsa_backend_plugin.ops._triton.quant import fp8_constants


@triton.jit
def rope_ptr(packed_ptr, row, ROW_BYTES: tl.constexpr, ROPE: tl.constexpr, DTYPE: tl.constexpr):
    """Start of the unquantized end of packed rows."""
    BYTES: tl.constexpr = ROPE * (DTYPE.primitive_bitwidth // 8)
    return (packed_ptr + row * ROW_BYTES + (ROW_BYTES - BYTES)).to(tl.pointer_type(DTYPE))


@triton.jit
def unpack_kernel(
    packed_ptr,  # [rows or slots, ROW_BYTES] uint8
    slots_ptr,  # [rows] int32 or int64 where GATHERS: the row that each comes from
    out_ptr,  # [rows, VALUE_DIM + ROPE]
    rows,
    VALUE_DIM: tl.constexpr,
    ROPE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    TILE: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    GATHERS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK * TILES_BLOCK)[:, None]
    row, tile = first + index // TILES_BLOCK, index % TILES_BLOCK
    keep = (row < rows) & (tile < VALUE_DIM // TILE)
    dim = tile * TILE + tl.arange(0, TILE)[None, :]
    source = tl.load(slots_ptr + row, mask=keep, other=0).to(tl.int64) if GATHERS else row
    row_ptr = packed_ptr + source * ROW_BYTES
    value = tl.load(row_ptr + dim, mask=keep, other=0).to(FP8, bitcast=True).to(tl.float32)
    scale = tl.load((row_ptr + VALUE_DIM + 4 * tile).to(tl.pointer_type(tl.float32)), mask=keep, other=0.0)
    tl.store(out_ptr + row * (VALUE_DIM + ROPE) + dim, (value * scale).to(out_ptr.dtype.element_ty), mask=keep)

    if ROPE:
        row = first + tl.arange(0, BLOCK)[:, None]
        dim = tl.arange(0, ROPE_BLOCK)[None, :]
        keep = (row < rows) & (dim < ROPE)
        source = tl.load(slots_ptr + row, mask=row < rows, other=0).to(tl.int64) if GATHERS else row
        rope = tl.load(rope_ptr(packed_ptr, source, ROW_BYTES, ROPE, out_ptr.dtype.element_ty) + dim, mask=keep)
        tl.store(out_ptr + row * (VALUE_DIM + ROPE) + VALUE_DIM + dim, rope, mask=keep)


def config(rows: int) -> tuple[int, int]:
    """(rows per program, warps): one warp per row, 4 rows to a program once there are enough programs."""
    return (1, 1) if rows <= 512 else (4, 4)


def row_constants(value_dim: int, tile_size: int, rope: int, row_bytes: int, block: int) -> dict[str, Any]:
    return {
        "VALUE_DIM": value_dim,
        "ROPE": rope,
        "ROW_BYTES": row_bytes,
        "TILE": tile_size,
        "TILES_BLOCK": triton.next_power_of_2(value_dim // tile_size),
        "ROPE_BLOCK": triton.next_power_of_2(max(rope, 1)),
        "BLOCK": block,
    }


def unpack(
    packed: torch.Tensor,
    out: torch.Tensor,
    value_dim: int,
    tile_size: int = LATENT_TILE,
    slots: torch.Tensor | None = None,
) -> None:
    """Write rows packed [N, bytes] uint8, contiguous and on a 4-byte boundary, into out [N, d].

    slots: [N] int32 or int64, contiguous: which rows of packed [slots, bytes] instead.
    """
    rows, row_bytes = out.shape[0], packed.shape[1]
    if rows:
        block, warps = config(rows)
        launch(
            unpack_kernel,
            (triton.cdiv(rows, block),),
            packed,
            out if slots is None else slots,
            out,
            rows,
            GATHERS=slots is not None,
            FP8=fp8_constants(PACKED_FP8)["FP8"],
            num_warps=warps,
            **row_constants(value_dim, tile_size, out.shape[1] - value_dim, row_bytes, block),
        )
