"""RMS norm and the fp8 quantization of its result in one step: the input of a block-fp8 GEMM."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import SCALE_FORMATS
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops.arch import fp8_dtype
from nsa_backend_plugin.ops.registry import Operation

GROUP = 128  # values that share a scale
_ALIGNMENT = 4  # scales: 16 bytes, what a TMA load starts on

_rms = Operation("norm_quant", "rms")


def rms(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    scale_format: str = "fp32",
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [T, N] fp8, scales [T, N / 128] fp32): values * scales is the RMS norm of x, rounded to x's dtype.

    x: [T, N] bf16/fp16/fp32, rows strided freely, N a multiple of 128. weight: [N].
    A scale is max(amax, 1e-4) / fp8 max of 128 values, rounded up to a power of two with scale_format "ue8m0". The
    scales lie column by column, each column on a multiple of 16 bytes, as DeepGEMM reads them.
    Raises ValueError for bad shapes, dtypes or devices. Source: SGLang's RMSNorm and per-token-group quantization.
    """
    checks.tensor("x", x, (None, None), checks.FLOAT_DTYPES)
    checks.inner_contiguous("x", x)
    tokens, width = x.shape
    checks.require(width > 0 and width % GROUP == 0, "x.shape[1]", width, f"a multiple of {GROUP}")
    checks.tensor("weight", weight, (width,), checks.FLOAT_DTYPES, x.device)
    checks.contiguous("weight", weight)
    checks.require(eps > 0, "eps", eps, "a positive number")
    checks.choice("scale_format", scale_format, SCALE_FORMATS)
    values = torch.empty(tokens, width, dtype=fp8_dtype(x.device), device=x.device)
    padded = -(-tokens // _ALIGNMENT) * _ALIGNMENT
    scales = torch.empty(width // GROUP, padded, dtype=torch.float32, device=x.device).t()[:tokens]
    _rms(
        impl,
        x.device,
        {"tokens": tokens, "width": width},
        x,
        weight,
        eps=eps,
        scale_format=scale_format,
        values=values,
        scales=scales,
    )
    return values, scales
