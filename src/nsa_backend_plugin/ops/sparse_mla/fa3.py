"""FlashAttention 3 (sgl_kernel) over bf16 rows: the selected slots as a page table of page size 1.

FA3 reads a prefix of each page-table row, so missing slots, which may stand anywhere, are first sorted behind the
others; that sort costs more than the attention of a small batch.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._vendor import mla
from nsa_backend_plugin.ops.support import Support, no


def available(arch: str) -> Support:
    if arch != "sm_90":
        return no(f"FlashAttention 3 with a latent value part needs sm_90, not {arch}")
    return mla.can_import("sgl_kernel.flash_attn", "flash_attn_with_kvcache")


def accepts_attend(
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
) -> Support:
    if kv.dtype != torch.bfloat16:
        return no(f"kv is {kind} ({kv.dtype}): only bfloat16 rows")
    if indices.shape[1] == 0:
        return no("top-k 0")
    return mla.fits(q, kv, value_dim)


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
    page_table, lengths = mla.compact(indices)
    mla.fa3_decode(q, kv, page_table, lengths, softmax_scale, 1, value_dim, 0, out, lse)
