"""MLA decode attention over whole contexts in a paged latent cache."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import LATENT_DIM
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops.registry import Operation

_decode = Operation("dense_mla", "decode")
PAGE_SIZES = (1, 16, 32, 64, 128)


def decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    *,
    page_size: int,
    value_dim: int = LATENT_DIM,
    num_kv_splits: int | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of one query per request over the first seq_lens[b] tokens of its pages.

    q: [B, H, 576] bf16, fp16 or fp32, contiguous. kv: [slots, 1, 576], q's dtype; slot = page * page_size + offset.
    block_table: [B, max_pages] int32. seq_lens: [B] int32. page_size: 1, 16, 32, 64 or 128.
    num_kv_splits: parts each context is cut into (None = from the shape).
    out: [B, H, value_dim] in q's dtype. workspace: uint8 scratch of at least `workspace_bytes(...)` (None allocates).
    Returns out [B, H, value_dim], and lse [B, H] fp32 (natural log) with return_lse; length 0 gives out 0, lse -inf.
    Raises ValueError for bad shapes, dtypes, devices, page sizes, and on CPU for pages or lengths out of range.
    Source: DeepSeek-V2/V3 MLA with absorbed projections; FlashMLA dense decode.
    """
    checks.tensor("q", q, (None, None, None), checks.FLOAT_DTYPES)
    checks.contiguous("q", q)
    batch, heads, query_dim = q.shape
    checks.positive("value_dim", value_dim)
    checks.require(value_dim <= query_dim, "value_dim", value_dim, f"at most q's last dimension {query_dim}")
    checks.require(1 <= heads <= 128, "q.shape[1]", heads, "1 to 128 heads")
    checks.choice("page_size", page_size, PAGE_SIZES)
    checks.tensor("kv", kv, (None, 1, query_dim), q.dtype, q.device)
    checks.inner_contiguous("kv", kv)
    checks.tensor("block_table", block_table, (batch, None), torch.int32, q.device)
    checks.inner_contiguous("block_table", block_table)
    checks.tensor("seq_lens", seq_lens, (batch,), torch.int32, q.device)
    checks.index_range("seq_lens", seq_lens, 0, block_table.shape[1] * page_size + 1)
    if num_kv_splits is not None:
        checks.positive("num_kv_splits", num_kv_splits)
    if out is None:
        out = torch.empty(batch, heads, value_dim, dtype=q.dtype, device=q.device)
    else:
        checks.tensor("out", out, (batch, heads, value_dim), q.dtype, q.device)
        checks.contiguous("out", out)
    lse = torch.empty(batch, heads, dtype=torch.float32, device=q.device) if return_lse else None
    _decode(
        impl,
        q.device,
        {"batch": batch, "heads": heads, "page_size": page_size, "context": block_table.shape[1] * page_size},
        q,
        kv,
        block_table,
        seq_lens,
        softmax_scale,
        page_size=page_size,
        value_dim=value_dim,
        num_kv_splits=num_kv_splits,
        out=out,
        lse=lse,
        workspace=workspace,
    )
    return out if lse is None else (out, lse)


def workspace_bytes(
    max_batch: int,
    heads: int,
    device: torch.device | str,
    value_dim: int = LATENT_DIM,
    num_kv_splits: int | None = None,
) -> int:
    """Scratch bytes that suffice for every implementation on this device and every call of up to max_batch."""
    return _decode.workspace_bytes(
        device, max_batch=max_batch, heads=heads, value_dim=value_dim, num_kv_splits=num_kv_splits
    )
