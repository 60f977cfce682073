"""Triton kernel of the quantizing RMS norm: one program per token.

Its bytes may differ from the reference's by a rounding: sums in another order, products in place of divisions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_backend_plugin.ops._triton import early_launch, support
from nsa_backend_plugin.ops._triton.early_launch import await_predecessor
from nsa_backend_plugin.ops._triton.launch import launch
from nsa_backend_plugin.ops._triton.quant import declines_fp8, fp8_constants, scale_from_amax
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.norm_quant import GROUP, Result, Rms

available = support.available

_WARPS = 8  # 16 groups of 128 values: 8 values a lane, one load


@triton.jit
def _rms_kernel(
    x_ptr,  # [tokens, GROUPS * GROUP]
    weight_ptr,
    values_ptr,  # bytes, contiguous
    scales_ptr,  # [GROUPS, scales_stride], a token's scales in a column
    eps,
    x_stride,
    scales_stride,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # power of two, at least GROUPS
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    UE8M0: tl.constexpr,
    EARLY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, ROWS)
    inside = (group < GROUPS)[:, None]
    dim = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    await_predecessor(EARLY)
    x = tl.load(x_ptr + token * x_stride + dim, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + dim, mask=inside, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(tl.sum(wide * wide, axis=1)) / (GROUPS * GROUP) + eps)
    normalized = (wide * inverse * weight).to(x.dtype).to(tl.float32)
    scale = scale_from_amax(tl.max(tl.abs(normalized), axis=1), FP8_MAX, UE8M0)
    tl.store(scales_ptr + group * scales_stride + token, scale, mask=group < GROUPS)
    # By the reciprocal: with a division for each value the kernel has twice the instructions and takes twice the time.
    quantized = tl.clamp(normalized * (1.0 / scale)[:, None], -FP8_MAX, FP8_MAX).to(FP8).to(tl.uint8, bitcast=True)
    tl.store(values_ptr + token * (GROUPS * GROUP) + dim, quantized, mask=inside)


def declines_rms(call: Rms) -> Reason:
    return declines_fp8(call.arch, call.fp8_dtype)


def rms(call: Rms) -> Result:
    values, scales = call.output()
    tokens, groups = scales.shape
    if tokens:
        launch(
            _rms_kernel,
            (tokens,),
            call.x,
            call.weight,
            values.view(torch.uint8),
            scales,
            call.eps,
            call.x.stride(0),
            scales.stride(1),
            GROUPS=groups,
            GROUP=GROUP,
            ROWS=triton.next_power_of_2(groups),
            UE8M0=call.scale_format == "ue8m0",
            **fp8_constants(values.dtype),
            num_warps=_WARPS,
            **early_launch.options(call.arch),
        )
    return values, scales
