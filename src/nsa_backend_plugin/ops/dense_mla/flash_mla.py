"""FlashMLA's dense decode over bf16 pages of 64 tokens, any head count, on Hopper.

From sgl_kernel (sglang-kernel 0.4.5) or flash_mla (sgl-flash-mla 1.0.0). The tile scheduler's metadata is made per
call, on the device; it depends on the lengths, so an engine may make it once per step and share it among layers.
"""

from __future__ import annotations

from typing import Any

import torch

from nsa_backend_plugin.ops._vendor import mla
from nsa_backend_plugin.ops.support import YES, Support, no

_PAGE = 64
_NAMES = ("flash_mla_with_kvcache", "get_mla_metadata")


def available(arch: str) -> Support:
    if arch != "sm_90":
        return no(f"FlashMLA's dense decode needs sm_90, not {arch}")
    sgl_kernel = mla.can_import("sgl_kernel.flash_mla", *_NAMES)
    flash_mla = mla.can_import("flash_mla", *_NAMES)
    return YES if sgl_kernel.ok or flash_mla.ok else no(f"{sgl_kernel.reason}; {flash_mla.reason}")


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
    if page_size != _PAGE:
        return no(f"page_size {page_size}: only {_PAGE}")
    if num_kv_splits is not None:
        return no("num_kv_splits is given: its scheduler chooses the splits")
    if not block_table.is_contiguous():
        return no(f"block_table has strides {block_table.stride()}: only contiguous")
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
    batch, heads, dim = q.shape
    arguments: dict[str, Any] = dict(
        q=q.view(batch, 1, heads, dim),
        k_cache=kv.view(-1, page_size, 1, dim),
        block_table=block_table,
        cache_seqlens=seq_lens,
        head_dim_v=value_dim,
        softmax_scale=softmax_scale,
        causal=False,
    )
    if mla.can_import("sgl_kernel.flash_mla", *_NAMES).ok:
        from sgl_kernel.flash_mla import flash_mla_with_kvcache, get_mla_metadata

        metadata, splits = get_mla_metadata(seq_lens, heads, 1, is_fp8_kvcache=False)
        vendor_out, vendor_lse = flash_mla_with_kvcache(
            **arguments, tile_scheduler_metadata=metadata, num_splits=splits
        )
    else:
        from flash_mla import flash_mla_with_kvcache, get_mla_metadata

        metadata, _ = get_mla_metadata()
        vendor_out, vendor_lse = flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=metadata, use_legacy=True)
    mla.write(out, lse, vendor_out[:, 0], vendor_lse[:, :, 0], seq_lens == 0)
