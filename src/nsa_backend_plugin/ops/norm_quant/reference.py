"""Torch reference of the quantizing RMS norm."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import MIN_AMAX, fp8_max
from nsa_backend_plugin.ops.support import YES, Support


def available(arch: str) -> Support:
    return YES


def rms(x: torch.Tensor, weight: torch.Tensor, *, eps: float, values: torch.Tensor, scales: torch.Tensor) -> None:
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    groups = normalized.to(x.dtype).float().unflatten(-1, (scales.shape[1], -1))
    limit = fp8_max(values.dtype)
    scales.copy_(groups.abs().amax(-1).clamp_min(MIN_AMAX) / limit)
    values.copy_((groups / scales[..., None]).clamp(-limit, limit).flatten(1).to(values.dtype))
