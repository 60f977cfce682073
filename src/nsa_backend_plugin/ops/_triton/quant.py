"""Quantization to fp8 inside Triton kernels, bit for bit as the references do it. Shared by the triton.py files."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nsa_backend_plugin.layouts import MIN_AMAX, fp8_max
from nsa_backend_plugin.ops._triton.support import has_e4m3
from nsa_backend_plugin.ops.arch import arch_fp8_dtype
from nsa_backend_plugin.ops.call import Reason

_MIN_AMAX = tl.constexpr(MIN_AMAX)


def declines_fp8(arch: str, dtype: torch.dtype) -> Reason:
    """Why kernels of an architecture cannot convert to an fp8 flavour. The interpreter converts to both."""
    if not has_e4m3(arch):
        return f"{arch} has no e4m3 conversion"
    if arch != "cpu" and dtype != arch_fp8_dtype(arch):
        return f"{arch} converts to {arch_fp8_dtype(arch)}, not to {dtype}"
    return None


def fp8_constants(dtype: torch.dtype) -> dict[str, Any]:
    """The FP8 and FP8_MAX compile-time arguments of a kernel."""
    name = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e4m3fnuz: tl.float8e4b8}[dtype]
    return {"FP8": name, "FP8_MAX": fp8_max(dtype)}


@triton.jit
def scale_from_amax(amax, FP8_MAX: tl.constexpr, UE8M0: tl.constexpr):
    """max(amax, 1e-4) / FP8_MAX in IEEE division, rounded up to a power of two with UE8M0."""
    scale = tl.div_rn(tl.maximum(amax, _MIN_AMAX), tl.full(amax.shape, FP8_MAX, tl.float32))
    if UE8M0:
        # Any mantissa bit carries into the exponent; clearing the mantissa leaves the next power of two.
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def to_fp8(x, scale, FP8: tl.constexpr, FP8_MAX: tl.constexpr, UE8M0: tl.constexpr):
    """Bytes (uint8) of x / scale, saturated and rounded to nearest even. x and scale: fp32, broadcastable."""
    if UE8M0:
        x = x * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)  # exact: both are powers of two
    else:
        x = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    return tl.clamp(x, -FP8_MAX, FP8_MAX).to(FP8).to(tl.uint8, bitcast=True)
