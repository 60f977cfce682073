"""Quantization to fp8 in torch, shared by the references."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import MIN_AMAX, fp8_max


def quantize_rows(x: torch.Tensor, scale_format: str, fp8_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., D] -> (fp8 [..., D], fp32 scale [...]) with scale = max(amax, 1e-4) / fp8_max, one per row."""
    x = x.float()
    limit = fp8_max(fp8_dtype)
    amax = x.abs().amax(dim=-1).clamp_min(MIN_AMAX)
    scale = amax / torch.full_like(amax, limit)  # a tensor: CUDA would multiply by the reciprocal of a number
    if scale_format == "ue8m0":
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2**exponent, 0.5 <= mantissa < 1
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return (x / scale[..., None]).clamp(-limit, limit).to(fp8_dtype), scale
