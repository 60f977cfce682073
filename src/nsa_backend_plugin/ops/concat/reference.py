"""Torch reference of the MLA concatenations."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES, fp8_max
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.concat import MlaK, QAll


def available(arch: str) -> Reason:
    return None


def q_all(call: QAll) -> torch.Tensor:
    return torch.cat([call.q_nope, call.q_rope], dim=-1)


def mla_k(call: MlaK) -> torch.Tensor:
    out, nope = call.output(), call.k_nope.shape[2]
    out[..., :nope] = _convert(call.k_nope, out.dtype)
    out[..., nope:] = _convert(call.k_rope, out.dtype)
    return out


def _convert(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype in FP8_DTYPES and x.dtype != dtype:
        x = x.float().clamp(-fp8_max(dtype), fp8_max(dtype))
    return x.to(dtype)
