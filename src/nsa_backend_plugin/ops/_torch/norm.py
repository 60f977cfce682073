"""LayerNorm and RMSNorm in torch, as every reference that normalizes takes them."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops import checks

_NORMS = ("layer", "rms")


def check(norm: str, weight: torch.Tensor, bias: torch.Tensor | None, width: int, device: torch.device) -> None:
    """The arguments `norm`, `norm_weight` and `norm_bias` of rows of `width` values."""
    checks.choice("norm", norm, _NORMS)
    checks.tensor("norm_weight", weight, (width,), checks.FLOAT_DTYPES, device)
    checks.require((bias is not None) == (norm == "layer"), "norm_bias", bias, "a tensor with norm='layer' only")
    if bias is not None:
        checks.tensor("norm_bias", bias, (width,), checks.FLOAT_DTYPES, device)


def normalize(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: str, eps: float) -> torch.Tensor:
    """x [T, N] normalized by "layer" or "rms", times weight [N], plus bias [N] where given, in float32."""
    x = x.float()
    if norm == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
    return x if bias is None else x + bias.float()
