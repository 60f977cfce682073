"""The indexer's logits in torch, shared by the references and by an engine that keeps its keys unquantized."""

from __future__ import annotations

import torch


def weighted_logits(q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """q [T, H, D], k [S, D], k_scale [S], weights [T, H] -> [T, S] in float32."""
    dots = (q.float() @ k.float().T).relu()  # [T, H, S]
    return (weights.float()[:, None] @ dots)[:, 0] * k_scale.float()


def row_lengths(context_lens: torch.Tensor, next_n: int) -> torch.Tensor:
    """[B] or [B, next_n] context lengths -> [B, next_n] visible tokens of each query, never negative."""
    if context_lens.dim() == 2:
        return context_lens.clamp_min(0)
    behind = torch.arange(next_n - 1, -1, -1, device=context_lens.device, dtype=context_lens.dtype)
    return (context_lens[:, None] - behind).clamp_min(0)
