"""MLA decode attention over whole contexts in a paged latent cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES, LATENT_DIM
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops._torch import mla
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.call import Fact, Step
from nsa_backend_plugin.ops.dispatch import operation

PAGE_SIZES = (1, 16, 32, 64, 128)


@dataclass(slots=True, eq=False, kw_only=True)
class Decode(mla.MlaCall):
    """The arguments of `decode`; seq_lens is contiguous."""

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    page_size: int
    num_kv_splits: int | None
    kv_is_finite: bool

    def facts(self) -> Mapping[str, Fact]:
        batch, heads, _ = self.q.shape
        return {
            "batch": batch,
            "heads": heads,
            "page_size": self.page_size,
            "context": self.block_table.shape[1] * self.page_size,
            "dtype": str(self.kv.dtype),
            "splits": self.num_kv_splits or "free",
            "rows_have_keys": self.rows_have_keys,
            "kv_is_finite": self.kv_is_finite,
            "lse": self.return_lse,
        }

    def of_rows(self, rows: torch.Tensor) -> Decode:
        """With a cache of only the pages that these rows read."""
        table, lengths, page_size = self.block_table[rows], self.seq_lens[rows], self.page_size
        used = torch.arange(table.shape[1], device=table.device) * page_size < lengths[:, None]
        pages, places = table[used].long().unique(return_inverse=True)
        renumbered = torch.zeros_like(table)
        renumbered[used] = places.to(torch.int32)
        slots = pages[:, None] * page_size + torch.arange(page_size, device=table.device)
        kv = self.kv.view(torch.uint8)  # of bytes: not every operator of torch takes fp8
        return replace(
            self,
            q=self.q[rows],
            kv=kv[slots.flatten()].view(self.kv.dtype),
            block_table=renumbered,
            seq_lens=lengths,
            out=None,
            workspace=None,
            step=Step(),
        )


@operation
def decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    *,
    page_size: int,
    kv_scale: float | None = None,
    value_dim: int = LATENT_DIM,
    num_kv_splits: int | None = None,
    rows_have_keys: bool = False,
    kv_is_finite: bool = False,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    step: Step | None = None,
    impl: str | None = None,
) -> Decode:
    """Softmax attention of one query per request over the first seq_lens[b] tokens of its pages.

    q: [B, H, 576] bf16, fp16 or fp32, contiguous. kv: [slots, 1, 576], q's dtype, or fp8 with one scalar kv_scale
    (value = byte * kv_scale); slot = page * page_size + offset.
    block_table: [B, max_pages] int32, any row stride; entries past a length may be anything. seq_lens: [B] int32, any
    stride. page_size: 1, 16, 32, 64 or 128. num_kv_splits: parts each context is cut into (None = from the shape).
    rows_have_keys: the caller's promise that no length is 0. Vendors' results then need no pass that looks for such
    rows and clears them. kv_is_finite: the caller's promise that the rows of a request's last page past its length
    hold finite numbers. Kernels that load whole pages may then be used: they give those rows the weight 0, which makes
    NaN of NaN. A broken promise gives undefined results, the first one on a CPU ValueError.
    out: [B, H, value_dim] in q's dtype to write into. workspace: uint8 scratch of at least `workspace_bytes(...)`
    (None allocates; pass one inside CUDA graphs, one per stream).
    Returns out [B, H, value_dim], and lse [B, H] fp32 (natural log) with return_lse; length 0 gives out 0, lse -inf.
    Raises ValueError for bad shapes, dtypes, devices, strides, page sizes, and on CPU for pages or lengths out of
    range: a page that a length reaches must lie in kv whole.
    Source: DeepSeek-V2/V3 MLA with absorbed projections; FlashMLA dense decode.
    """
    batch, _, query_dim = mla.check(q, value_dim, softmax_scale, out, workspace)
    checks.choice("page_size", page_size, PAGE_SIZES)
    checks.tensor("kv", kv, (None, 1, query_dim), (q.dtype, *FP8_DTYPES), q.device)
    checks.inner_contiguous("kv", kv)
    checks.scale_of_fp8("kv_scale", kv_scale, kv.dtype in FP8_DTYPES)
    checks.tensor("block_table", block_table, (batch, None), torch.int32, q.device)
    checks.inner_contiguous("block_table", block_table)
    checks.tensor("seq_lens", seq_lens, (batch,), torch.int32, q.device)
    least = 1 if rows_have_keys else 0
    checks.index_range("seq_lens", seq_lens, least, block_table.shape[1] * page_size + 1)
    checks.used_pages("block_table", block_table, seq_lens, page_size, kv.shape[0] // page_size)
    if num_kv_splits is not None:
        checks.positive("num_kv_splits", num_kv_splits)
    return Decode(
        arch=device_arch(q.device),
        step=step or Step(),
        impl=impl,
        q=q,
        kv=kv,
        block_table=block_table,
        seq_lens=seq_lens.contiguous(),
        softmax_scale=softmax_scale,
        kv_scale=kv_scale,
        page_size=page_size,
        value_dim=value_dim,
        num_kv_splits=num_kv_splits,
        rows_have_keys=rows_have_keys,
        kv_is_finite=kv_is_finite,
        return_lse=return_lse,
        out=out,
        workspace=workspace,
    )


def workspace_bytes(
    max_batch: int,
    heads: int,
    device: torch.device | str,
    value_dim: int = LATENT_DIM,
    num_kv_splits: int | None = None,
) -> int:
    """Scratch bytes that suffice for every implementation on this device and every call of up to max_batch."""
    return decode.workspace_bytes(
        device, max_batch=max_batch, heads=heads, value_dim=value_dim, num_kv_splits=num_kv_splits
    )
