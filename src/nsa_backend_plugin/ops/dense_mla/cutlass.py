"""CUTLASS MLA decode (sgl_kernel) on sm_100, bf16; sgl_kernel pads the heads to 128."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._vendor import mla
from nsa_backend_plugin.ops.support import Support, no

_ARCHS = ("sm_100", "sm_103")
_TILE = 128  # tokens; a row of the page table covers a whole number of tiles


def available(arch: str) -> Support:
    if arch not in _ARCHS:
        return no(f"CUTLASS MLA needs {' or '.join(_ARCHS)}, not {arch}")
    return mla.can_import("sgl_kernel", "cutlass_mla_decode", "cutlass_mla_get_workspace_size")


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
    if lse is not None:
        return no("return_lse: it has no log-sum-exp")
    if block_table.shape[1] == 0 or block_table.shape[1] * page_size % _TILE:
        return no(f"block_table of {block_table.shape[1]} pages of {page_size}: only whole tiles of {_TILE} tokens")
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
    from sgl_kernel import cutlass_mla_decode, cutlass_mla_get_workspace_size

    splits = num_kv_splits or 1  # more than one is not safe in a CUDA graph, says sgl_kernel
    context = block_table.shape[1] * page_size
    needed = cutlass_mla_get_workspace_size(context, q.shape[0], num_kv_splits=splits)
    scratch = torch.empty(needed, dtype=torch.uint8, device=q.device)
    vendor_out = cutlass_mla_decode(
        q[..., :value_dim],
        q[..., value_dim:],
        kv.view(-1, page_size, kv.shape[-1]),
        seq_lens,
        block_table,
        scratch,
        softmax_scale,
        splits,
    )
    mla.write(out, None, vendor_out, None, seq_lens == 0)
