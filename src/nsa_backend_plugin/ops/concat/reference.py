"""Torch reference of the MLA concatenations."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops.support import YES, Support


def available(arch: str) -> Support:
    return YES


def q_all(q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
    return torch.cat([q_nope, q_rope], dim=-1)


def mla_k(k_nope: torch.Tensor, k_rope: torch.Tensor, *, out: torch.Tensor) -> None:
    nope = k_nope.shape[-1]
    out[..., :nope] = k_nope.to(out.dtype)
    out[..., nope:] = k_rope.to(out.dtype)
