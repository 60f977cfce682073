"""AITER's MLA decode over whole contexts, bf16, page size 1. Checked against a fake, not run on AMD."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._vendor import aiter_mla
from nsa_backend_plugin.ops.support import Support, no


def available(arch: str) -> Support:
    return aiter_mla.available(arch)


def accepts_decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    *,
    page_size: int,
    value_dim: int,
    num_kv_splits: int | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> Support:
    if page_size != 1:
        return no(f"page_size {page_size}: only 1")
    if lse is not None:
        return no("return_lse: its log-sum-exp covers splits, not rows")
    if num_kv_splits is not None:
        return no("num_kv_splits is given: it chooses the splits itself")
    if block_table.shape[1] == 0:
        return no("block_table has no pages")
    return aiter_mla.fits(q, kv, value_dim)


def decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    *,
    page_size: int,
    value_dim: int,
    num_kv_splits: int | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> None:
    used = torch.arange(block_table.shape[1], device=q.device)[None, :] < seq_lens[:, None]
    entries, starts = aiter_mla.ragged(block_table, used)
    aiter_mla.decode(q, kv, entries, starts, softmax_scale, kv_scale=None, out=out)
