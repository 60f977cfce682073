"""Triton kernel of the MLA concatenations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from nsa_backend_plugin.layouts import FP8_DTYPES
from nsa_backend_plugin.ops._triton.quant import accepts_fp8, arch_fp8_dtype, fp8_constants
from nsa_backend_plugin.ops._triton.support import CompileCase, available, has_e4m3
from nsa_backend_plugin.ops.support import YES, Support, no

__all__ = ["accepts_mla_k", "available", "compile_cases", "mla_k", "q_all"]


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


def _launch(nope: torch.Tensor, rope: torch.Tensor, out: torch.Tensor, rope_stride_h: int) -> None:
    tokens, heads, nope_dim = nope.shape
    rope_dim = rope.shape[2]
    rows = tokens * heads
    if rows == 0:
        return
    constants = {"FP8": None, "FP8_MAX": 0.0}
    if out.dtype in FP8_DTYPES:
        if nope.dtype == out.dtype:
            nope, rope = nope.view(torch.uint8), rope.view(torch.uint8)
        else:
            constants = fp8_constants(out.dtype)
        out = out.view(torch.uint8)
    block, warps = _config(rows, nope_dim + rope_dim)
    _concat_kernel[(triton.cdiv(rows, block),)](
        nope,
        rope,
        out,
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


def q_all(q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
    out = q_nope.new_empty(*q_nope.shape[:2], q_nope.shape[2] + q_rope.shape[2])
    _launch(q_nope, q_rope, out, q_rope.stride(1))
    return out


def accepts_mla_k(k_nope: torch.Tensor, k_rope: torch.Tensor, *, out: torch.Tensor) -> Support:
    if out.dtype == k_nope.dtype:
        return YES
    if k_nope.dtype in FP8_DTYPES:
        return no(f"does not convert {k_nope.dtype} to {out.dtype}")
    return accepts_fp8(out.device, out.dtype) if out.dtype in FP8_DTYPES else YES


def mla_k(k_nope: torch.Tensor, k_rope: torch.Tensor, *, out: torch.Tensor) -> None:
    _launch(k_nope, k_rope, out, 0)


def compile_cases(arch: str) -> Iterator[CompileCase]:
    strides = ("nope_stride_t", "nope_stride_h", "rope_stride_t", "rope_stride_h")
    copies = {"bf16": {"FP8": None, "FP8_MAX": 0.0}}
    if has_e4m3(arch):
        copies["fp8"] = fp8_constants(arch_fp8_dtype(arch))
    for function, nope_dim in (("q_all", 512), ("mla_k", 128)):
        for target, constants in copies.items():
            if function == "q_all" and target == "fp8":
                continue  # q_all never converts
            for rows in (128, 1 << 20):
                block, warps = _config(rows, nope_dim + 64)
                yield CompileCase(
                    f"{function}.{target}.rows{rows}",
                    _concat_kernel,
                    dict(nope_ptr="*bf16", rope_ptr="*bf16", out_ptr="*u8" if target == "fp8" else "*bf16")
                    | dict.fromkeys(("rows", "heads", *strides), "i32"),
                    dict(NOPE=nope_dim, ROPE=64, NOPE_BLOCK=nope_dim, ROPE_BLOCK=64, BLOCK=block, **constants),
                    num_warps=warps,
                    divisible=("nope_ptr", "rope_ptr", "out_ptr", "rows", "heads", *strides),
                )
