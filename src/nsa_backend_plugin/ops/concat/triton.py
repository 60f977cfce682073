"""Triton kernel of the MLA concatenations."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nsa_backend_plugin.layouts import FP8_DTYPES
from nsa_backend_plugin.ops._triton import support
from nsa_backend_plugin.ops._triton.launch import launch
from nsa_backend_plugin.ops._triton.quant import declines_fp8, fp8_constants
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.concat import MlaK, QAll

available = support.available


@triton.jit
def _convert(x, FP8: tl.constexpr, FP8_MAX: tl.constexpr):
    """fp8 bytes, saturated; without FP8 the value itself."""
    if FP8 is not None:
        x = tl.clamp(x.to(tl.float32), -FP8_MAX, FP8_MAX).to(FP8).to(tl.uint8, bitcast=True)
    return x


@triton.jit
def _concat_kernel(
    nope_ptr,  # [tokens, heads, NOPE]
    rope_ptr,  # [tokens, heads, ROPE]; stride 0 over heads repeats one row
    out_ptr,  # [tokens, heads, NOPE + ROPE] contiguous
    rows,
    heads,
    nope_stride_t,
    nope_stride_h,
    rope_stride_t,
    rope_stride_h,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,  # powers of two
    ROPE_BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    token = (row // heads).to(tl.int64)
    head = row % heads
    nope_dim = tl.arange(0, NOPE_BLOCK)[None, :]
    rope_dim = tl.arange(0, ROPE_BLOCK)[None, :]
    nope_inside = (row < rows) & (nope_dim < NOPE)
    rope_inside = (row < rows) & (rope_dim < ROPE)

    nope = tl.load(nope_ptr + token * nope_stride_t + head * nope_stride_h + nope_dim, mask=nope_inside)
    rope = tl.load(rope_ptr + token * rope_stride_t + head * rope_stride_h + rope_dim, mask=rope_inside)
    out_row_ptr = out_ptr + row.to(tl.int64) * (NOPE + ROPE)
    tl.store(out_row_ptr + nope_dim, _convert(nope, FP8, FP8_MAX), mask=nope_inside)
    tl.store(out_row_ptr + NOPE + rope_dim, _convert(rope, FP8, FP8_MAX), mask=rope_inside)


def _config(rows: int, width: int) -> tuple[int, int]:
    """(rows per program, warps): about 12 KB moved by 4 warps, or one warp per row while rows are few."""
    if rows <= 1024:
        return 4, 2
    return max(4, 8192 // triton.next_power_of_2(width)), 4


def _launch(nope: torch.Tensor, rope: torch.Tensor, out: torch.Tensor, rope_stride_h: int) -> torch.Tensor:
    tokens, heads, nope_dim = nope.shape
    rope_dim = rope.shape[2]
    rows = tokens * heads
    if rows == 0:
        return out
    constants: dict[str, Any] = {"FP8": None, "FP8_MAX": 0.0}
    target = out
    if out.dtype in FP8_DTYPES:
        if nope.dtype == out.dtype:
            nope, rope = nope.view(torch.uint8), rope.view(torch.uint8)
        else:
            constants = fp8_constants(out.dtype)
        target = out.view(torch.uint8)
    block, warps = _config(rows, nope_dim + rope_dim)
    launch(
        _concat_kernel,
        (triton.cdiv(rows, block),),
        nope,
        rope,
        target,
        rows,
        heads,
        nope.stride(0),
        nope.stride(1),
        rope.stride(0),
        rope_stride_h,
        NOPE=nope_dim,
        ROPE=rope_dim,
        NOPE_BLOCK=triton.next_power_of_2(nope_dim),
        ROPE_BLOCK=triton.next_power_of_2(rope_dim),
        BLOCK=block,
        num_warps=warps,
        **constants,
    )
    return out


def q_all(call: QAll) -> torch.Tensor:
    return _launch(call.q_nope, call.q_rope, call.output(), call.q_rope.stride(1))


def declines_mla_k(call: MlaK) -> Reason:
    source, target = call.k_nope.dtype, call.dtype
    if source == target:
        return None
    if source in FP8_DTYPES:
        return f"does not convert {source} to {target}"
    return declines_fp8(call.arch, target) if target in FP8_DTYPES else None


def mla_k(call: MlaK) -> torch.Tensor:
    return _launch(call.k_nope, call.k_rope, call.output(), 0)
