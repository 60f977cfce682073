"""Torch reference of sparse MLA attention, in float32, one token at a time."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._torch.packed_rows import unpack
from nsa_backend_plugin.ops.support import YES, Support


def available(arch: str) -> Support:
    return YES


def rows(kv: torch.Tensor, slots: torch.Tensor, kind: str, kv_scale: float | None, value_dim: int) -> torch.Tensor:
    """Latent rows of the given slots [K], dequantized to float32 [K, query_dim]."""
    picked = kv[slots.long(), 0]
    if kind == "packed":
        return unpack(picked.view(torch.uint8), value_dim)
    return picked.float() * (1.0 if kv_scale is None else kv_scale)


def softmax_attention(
    q: torch.Tensor, latent: torch.Tensor, softmax_scale: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [H, D], latent [K, D] -> (out [H, value_dim], lse [H]); no rows give 0 and -inf."""
    scores = q.float() @ latent.T * softmax_scale
    lse = torch.logsumexp(scores, dim=-1)
    if latent.shape[0] == 0:
        return torch.zeros(q.shape[0], value_dim, device=q.device), torch.full_like(lse, float("-inf"))
    return torch.softmax(scores, dim=-1) @ latent[:, :value_dim], lse


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    *,
    kind: str,
    kv_scale: float | None,
    value_dim: int,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> None:
    for t in range(q.shape[0]):
        slots = indices[t][indices[t] >= 0]
        latent = rows(kv, slots, kind, kv_scale, value_dim)
        token_out, token_lse = softmax_attention(q[t], latent, softmax_scale, value_dim)
        out[t] = token_out.to(out.dtype)
        if lse is not None:
            lse[t] = token_lse
