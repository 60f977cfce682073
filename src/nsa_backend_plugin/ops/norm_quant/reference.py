"""Torch reference of the quantizing RMS norm."""

from __future__ import annotations

from nsa_backend_plugin.ops._torch.norm import normalize
from nsa_backend_plugin.ops._torch.quant import quantize_rows
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.norm_quant import GROUP, Result, Rms


def available(arch: str) -> Reason:
    return None


def rms(call: Rms) -> Result:
    values, scales = call.output()
    normalized = normalize(call.x, call.weight, None, "rms", call.eps).to(call.x.dtype)
    quantized, scale = quantize_rows(normalized.unflatten(-1, (-1, GROUP)), call.scale_format, values.dtype)
    values.copy_(quantized.flatten(1))
    scales.copy_(scale)
    return values, scales
