"""Triton kernel of the projections: one program for some rows of the weights, over the whole depth."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_backend_plugin.ops._triton import early_launch, support
from nsa_backend_plugin.ops._triton.early_launch import await_predecessor
from nsa_backend_plugin.ops._triton.launch import launch
from nsa_backend_plugin.ops._triton.quant import declines_fp8, fp8_constants, scale_from_amax
from nsa_backend_plugin.ops.arch import arch_fp8_dtype
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.projection import GROUP, Linear, PerHead

available = support.available

_ROWS = 32
_TOKENS = 16  # the least of a matrix instruction
_MOST_TOKENS = 64  # of a program
_WARPS = 4


@triton.jit
def _load_tokens(x_ptr, norm_ptr, inverse_rms, x_row, depth, tokens_exist, NORM: tl.constexpr):
    x = tl.load(x_ptr + x_row[:, None] + depth[None, :], mask=tokens_exist[:, None], other=0.0)
    if NORM:
        weight = tl.load(norm_ptr + depth).to(tl.float32)
        x = (x.to(tl.float32) * inverse_rms[:, None] * weight[None, :]).to(x.dtype)
    return x


@triton.jit
def _projection_kernel(
    x_ptr,  # [tokens, heads, DEPTH]
    weight_ptr,  # [heads, rows, DEPTH]
    scale_ptr,  # [ceil(rows / GROUP), DEPTH / GROUP]
    norm_ptr,  # [DEPTH]
    out_ptr,  # [tokens, heads, rows]
    tokens,
    rows,
    eps,
    x_token,
    x_head,
    weight_head,
    out_token,
    out_head,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,  # of the depth
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
):
    first_row, head = tl.program_id(0) * ROWS, tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    exists = token < tokens
    x_row = token.to(tl.int64) * x_token + head * x_head
    row = first_row + tl.arange(0, ROWS)
    row_exists = row < rows
    weight_row = weight_ptr + head.to(tl.int64) * weight_head + row.to(tl.int64) * DEPTH
    await_predecessor(EARLY)
    inverse_rms = tl.full((TOKENS,), 1.0, tl.float32)
    if NORM:
        squares = tl.zeros((TOKENS,), tl.float32)
        for start in range(0, DEPTH, BLOCK):
            x = tl.load(x_ptr + x_row[:, None] + start + tl.arange(0, BLOCK)[None, :], mask=exists[:, None], other=0.0)
            squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)
        inverse_rms = tl.rsqrt(squares / DEPTH + eps)
    sums = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, DEPTH, BLOCK):
        depth = start + tl.arange(0, BLOCK)
        weight = tl.load(weight_row[:, None] + depth[None, :], mask=row_exists[:, None], other=0.0)
        x = _load_tokens(x_ptr, norm_ptr, inverse_rms, x_row, depth, exists, NORM)
        if QUANTIZED:
            # ROWS divides GROUP: the program's rows share their scale.
            scale = tl.load(scale_ptr + (first_row // GROUP) * (DEPTH // GROUP) + start // GROUP)
            wide = x.to(tl.float32)
            token_scale = scale_from_amax(tl.max(tl.abs(wide), axis=1), FP8_MAX, False)
            values = wide * (1.0 / token_scale)[:, None]
            values = tl.clamp(values, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL).to(FP8)
            sums += tl.dot(values, tl.trans(weight)) * (token_scale * scale)[:, None]
        else:
            sums = tl.dot(x, tl.trans(weight), sums)
    out = out_ptr + token.to(tl.int64)[:, None] * out_token + head * out_head + row[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=exists[:, None] & row_exists[None, :])


def declines_linear(call: Linear) -> Reason:
    return None if call.weight_scale is None else declines_fp8(call.arch, call.weight.dtype)


def linear(call: Linear) -> torch.Tensor:
    _launch(
        call,
        *(call.weight_scale, call.norm_weight, call.eps),
        heads=1,
        rows=call.weight.shape[0],
        strides=(call.x.stride(0), 0, 0, call.out.stride(0), 0),
    )
    return call.out


def per_head(call: PerHead) -> torch.Tensor:
    heads, rows, _ = call.weight.shape
    strides = (*call.x.stride()[:2], call.weight.stride(0), *call.out.stride()[:2])
    _launch(call, None, None, 0.0, heads=heads, rows=rows, strides=strides)
    return call.out


def _launch(
    call: Linear | PerHead,
    weight_scale: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    *,
    heads: int,
    rows: int,
    strides: tuple[int, ...],
) -> None:
    tokens, depth = call.x.shape[0], call.x.shape[-1]
    if tokens == 0 or heads == 0 or rows == 0:
        return
    tile = min(max(triton.next_power_of_2(tokens), _TOKENS), _MOST_TOKENS)
    quantized = weight_scale is not None
    launch(
        _projection_kernel,
        (triton.cdiv(rows, _ROWS), heads, triton.cdiv(tokens, tile)),
        *(call.x, call.weight, weight_scale, norm_weight, call.out),
        *(tokens, rows, eps, *strides),
        DEPTH=depth,
        GROUP=GROUP,
        BLOCK=GROUP if quantized or depth % GROUP == 0 else GROUP // 2,
        TOKENS=tile,
        ROWS=_ROWS,
        QUANTIZED=quantized,
        NORM=norm_weight is not None,
        **fp8_constants(arch_fp8_dtype(call.arch)),
        num_warps=_WARPS,
        num_stages=4 if tile == _TOKENS else 2,  # within the 64 KB that a block of gfx942 has
        **early_launch.options(call.arch),
    )
