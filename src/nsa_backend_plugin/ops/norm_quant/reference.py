"""Torch reference of the quantizing RMS norm."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._torch.norm import normalize
from nsa_backend_plugin.ops._torch.quant import quantize_rows
from nsa_backend_plugin.ops.support import YES, Support


def available(arch: str) -> Support:
    return YES


def rms(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    scale_format: str,
    values: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    groups = normalize(x, weight, None, "rms", eps).to(x.dtype).unflatten(-1, (scales.shape[1], -1))
    quantized, scale = quantize_rows(groups, scale_format, values.dtype)
    values.copy_(quantized.flatten(1))
    scales.copy_(scale)
