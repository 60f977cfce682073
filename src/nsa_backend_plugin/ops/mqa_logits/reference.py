"""Torch reference of the weighted MQA logits, in float32."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops.index_key_cache import reference as index_key_cache
from nsa_backend_plugin.ops.mqa_logits import new_logits
from nsa_backend_plugin.ops.support import YES, Support


def available(arch: str) -> Support:
    return YES


def weighted_logits(q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """q [T, H, D], k [S, D], k_scale [S], weights [T, H] -> [T, S] in float32."""
    dots = (q.float() @ k.float().T).relu()  # [T, H, S]
    return (weights.float()[:, None] @ dots)[:, 0] * k_scale.float()


def row_lengths(context_lens: torch.Tensor, next_n: int) -> torch.Tensor:
    """[B] or [B, next_n] context lengths -> [B, next_n] visible tokens of each query."""
    if context_lens.dim() == 2:
        return context_lens
    behind = torch.arange(next_n - 1, -1, -1, device=context_lens.device, dtype=context_lens.dtype)
    return (context_lens[:, None] - behind).clamp_min(0)


def paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
    *,
    layout: str,
    page_size: int,
    clean: bool,
    out: torch.Tensor | None,
) -> torch.Tensor:
    batch, next_n = q.shape[:2]
    out = new_logits(out, batch * next_n, max_context_len, q.device)
    if clean:
        out.fill_(float("-inf"))
    lengths = row_lengths(context_lens, next_n)
    for b in range(batch):
        for j in range(next_n):
            length, row = int(lengths[b, j]), b * next_n + j
            position = torch.arange(length, device=q.device)
            slots = block_table[b, position // page_size].long() * page_size + position % page_size
            k, scale = index_key_cache.read(cache, slots, layout=layout, page_size=page_size, fp8_dtype=q.dtype)
            out[row, :length] = weighted_logits(q[b, j : j + 1], k, scale, weights[row : row + 1])[0]
    return out


def ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_start: torch.Tensor,
    row_end: torch.Tensor,
    *,
    clean: bool,
    out: torch.Tensor | None,
) -> torch.Tensor:
    out = new_logits(out, q.shape[0], k.shape[0], q.device)
    column = torch.arange(k.shape[0], device=q.device)
    inside = (column >= row_start[:, None]) & (column < row_end[:, None])
    logits = weighted_logits(q, k, k_scale, weights)
    # Without clean the other columns keep what was there, like a kernel that skips them.
    return out.copy_(torch.where(inside, logits, torch.full_like(logits, float("-inf")) if clean else out))
