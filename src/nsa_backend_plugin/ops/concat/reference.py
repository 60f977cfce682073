"""Torch reference of the MLA concatenations."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES, fp8_max
from nsa_backend_plugin.ops.support import YES, Support


def available(arch: str) -> Support:
    return YES


def q_all(q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
    return torch.cat([q_nope, q_rope], dim=-1)


def mla_k(k_nope: torch.Tensor, k_rope: torch.Tensor, *, out: torch.Tensor) -> None:
    nope = k_nope.shape[-1]
    out[..., :nope] = _convert(k_nope, out.dtype)
    out[..., nope:] = _convert(k_rope, out.dtype)


def _convert(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype in FP8_DTYPES and x.dtype != dtype:
        x = x.float().clamp(-fp8_max(dtype), fp8_max(dtype))
    return x.to(dtype)
