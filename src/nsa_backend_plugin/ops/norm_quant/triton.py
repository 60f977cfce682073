"""Triton kernel of the quantizing RMS norm: one program per token.

Its bytes may differ from the reference's by a rounding: sums in another order, products in place of divisions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from nsa_backend_plugin.ops._triton import early_launch
from nsa_backend_plugin.ops._triton.early_launch import await_predecessor
from nsa_backend_plugin.ops._triton.quant import accepts_fp8, arch_fp8_dtype, fp8_constants, scale_from_amax
from nsa_backend_plugin.ops._triton.support import CompileCase, available, has_e4m3
from nsa_backend_plugin.ops.arch import device_arch, launches_early
from nsa_backend_plugin.ops.support import Support

__all__ = ["accepts_rms", "available", "compile_cases", "rms"]

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


def accepts_rms(x: torch.Tensor, weight: torch.Tensor, *, values: torch.Tensor, **_: object) -> Support:
    return accepts_fp8(x.device, values.dtype)


def rms(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    scale_format: str,
    values: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    tokens, groups = scales.shape
    if tokens == 0:
        return
    _rms_kernel[(tokens,)](
        x,
        weight,
        values.view(torch.uint8),
        scales,
        eps,
        x.stride(0),
        scales.stride(1),
        **_constants(groups, x.shape[1] // groups, values.dtype, scale_format),
        num_warps=_WARPS,
        **early_launch.options(device_arch(x.device)),
    )


def _constants(groups: int, group: int, dtype: torch.dtype, scale_format: str) -> dict[str, object]:
    rows = triton.next_power_of_2(groups)
    return dict(GROUPS=groups, GROUP=group, ROWS=rows, UE8M0=scale_format == "ue8m0", **fp8_constants(dtype))


def compile_cases(arch: str) -> Iterator[CompileCase]:
    if not has_e4m3(arch):
        return
    pointers = dict(x_ptr="*bf16", weight_ptr="*bf16", values_ptr="*u8", scales_ptr="*fp32")
    for width, scale_format in ((1536, "fp32"), (1536, "ue8m0"), (2048, "fp32")):
        yield CompileCase(
            f"rms.{width}.{scale_format}",
            _rms_kernel,
            pointers | dict(eps="fp32", x_stride="i32", scales_stride="i32"),
            _constants(width // 128, 128, arch_fp8_dtype(arch), scale_format) | {"EARLY": launches_early(arch)},
            num_warps=_WARPS,
            divisible=(*pointers, "x_stride"),
        )
