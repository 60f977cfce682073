"""LayerNorm and RMSNorm in torch, as every reference that normalizes takes them."""

from __future__ import annotations

import torch

NORMS = ("layer", "rms")


def normalize(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: str, eps: float) -> torch.Tensor:
    """x [T, N] normalized by "layer" or "rms", times weight [N], plus bias [N] where given, in float32."""
    x = x.float()
    if norm == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
    return x if bias is None else x + bias.float()
