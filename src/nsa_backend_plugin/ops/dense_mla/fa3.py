"""FlashAttention 3 (sgl_kernel) over bf16 pages of 1 or 64 tokens, up to 64 heads, on Hopper.

With more heads it loads whole pages, and NaN past a sequence's end spreads: its weight is 0, and 0 * NaN is NaN.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._vendor import mla
from nsa_backend_plugin.ops.support import Support, no

_PAGE_SIZES = (1, 64)
_MAX_HEADS = 64


def available(arch: str) -> Support:
    if arch != "sm_90":
        return no(f"FlashAttention 3 with a latent value part needs sm_90, not {arch}")
    return mla.can_import("sgl_kernel.flash_attn", "flash_attn_with_kvcache")


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
    if page_size not in _PAGE_SIZES:
        return no(f"page_size {page_size}: only {' and '.join(map(str, _PAGE_SIZES))}")
    if q.shape[1] > _MAX_HEADS:
        return no(f"{q.shape[1]} heads: at most {_MAX_HEADS}, it would read the last page past its length")
    return mla.fits(q, kv, value_dim, page_size)


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
    splits = num_kv_splits or 0  # 0: FA3's own choice
    mla.fa3_decode(q, kv, block_table, seq_lens, softmax_scale, page_size, value_dim, splits, out, lse)
