"""AITER's MLA decode, shared by the adapters of `sparse_mla` and `dense_mla`. Checked against a fake, not run on AMD.

`aiter.mla.mla_decode_fwd` reads ragged page lists of page size 1 and takes 16 to 128 heads in multiples of 16. With
fp8 rows it also wants a work plan, made per call on the device from the ragged starts; in sparse decode that plan
depends only on the counts of selected slots, so an engine may make it once per step and share it among layers.

The plan is the one of SGLang 0.5.23. That of 0.5.17 (`fast_mode=False`, `intra_batch_mode=True`, `topk` given) takes
the compacted slots for a table of fixed width and gave wrong plans at long contexts (SGLang pull request 39083).
"""

from __future__ import annotations

from typing import Any

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES
from nsa_backend_plugin.ops._vendor import mla
from nsa_backend_plugin.ops.support import Support, no

ARCHS = ("gfx942", "gfx950")
_MAX_SPLITS = 64
_MAX_BYTES = 1 << 32
_PLAN = ("get_mla_metadata_info_v1", "get_mla_metadata_v1")


def available(arch: str) -> Support:
    if arch not in ARCHS:
        return no(f"AITER's MLA decode needs {' or '.join(ARCHS)}, not {arch}")
    package = mla.can_import("aiter", *_PLAN)
    return mla.can_import("aiter.mla", "mla_decode_fwd") if package.ok else package


def fits(q: torch.Tensor, kv: torch.Tensor, value_dim: int) -> Support:
    size = kv.numel() * kv.element_size()
    if size > _MAX_BYTES:  # its offsets into the cache have 32 bits and wrap without a word (aiter 2768, 5765)
        return no(f"kv of {size} bytes: at most 4 GiB only")
    return mla.fits(q, kv, value_dim)


def ragged(values: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(entries [T*K] int32, starts [T+1] int32): the valid values [T, K] of all rows, one after the other.

    The device alone decides how many there are, so that a CUDA graph can capture it: invalid values all go to one
    spare place at the end.
    """
    rows, width = values.shape
    starts = torch.zeros(rows + 1, dtype=torch.int32, device=values.device)
    torch.cumsum(valid.sum(dim=1), dim=0, out=starts[1:])
    place = torch.where(valid, starts[:-1, None] + valid.cumsum(dim=1) - 1, rows * width)
    entries = torch.zeros(rows * width + 1, dtype=torch.int32, device=values.device)
    entries.scatter_(0, place.view(-1), values.reshape(-1))
    return entries[:-1], starts


def decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    entries: torch.Tensor,
    starts: torch.Tensor,
    softmax_scale: float,
    *,
    kv_scale: float | None,
    out: torch.Tensor,
) -> None:
    """One query per row over kv[entries[starts[t] : starts[t + 1]]]."""
    from aiter.mla import mla_decode_fwd

    rows, heads, dim = q.shape
    padded = mla.pad_heads(q, -(-heads // 16) * 16)
    query_starts = torch.arange(rows + 1, dtype=torch.int32, device=q.device)
    last_page_lens = torch.ones(rows, dtype=torch.int32, device=q.device)
    vendor_out = q.new_empty(rows, padded.shape[1], out.shape[-1])
    extra: dict[str, Any] = {}
    if kv.dtype in FP8_DTYPES:
        extra = _plan(padded, kv, query_starts, starts, last_page_lens)
        extra["q_scale"] = torch.ones((), dtype=torch.float32, device=q.device)
        extra["kv_scale"] = torch.full((), 1.0 if kv_scale is None else kv_scale, dtype=torch.float32, device=q.device)
    mla_decode_fwd(
        padded,
        kv.view(-1, 1, 1, dim),
        vendor_out,
        query_starts,
        starts,
        entries,
        last_page_lens,
        1,
        sm_scale=softmax_scale,
        **extra,
    )
    mla.write(out, None, vendor_out[:, :heads], None, starts[1:] == starts[:-1])


def _plan(
    q: torch.Tensor,
    kv: torch.Tensor,
    query_starts: torch.Tensor,
    starts: torch.Tensor,
    last_page_lens: torch.Tensor,
) -> dict[str, torch.Tensor]:
    from aiter import get_mla_metadata_info_v1, get_mla_metadata_v1

    rows, heads, _ = q.shape
    sizes = get_mla_metadata_info_v1(
        rows,
        1,
        heads,
        q.dtype,
        kv.dtype,
        is_sparse=True,
        fast_mode=True,
        intra_batch_mode=False,
    )
    names = (
        "work_meta_data",
        "work_indptr",
        "work_info_set",
        "reduce_indptr",
        "reduce_final_map",
        "reduce_partial_map",
    )
    plan = {
        name: torch.empty(size, dtype=dtype, device=q.device) for name, (size, dtype) in zip(names, sizes, strict=True)
    }
    get_mla_metadata_v1(
        query_starts,
        starts,
        last_page_lens,
        heads,
        1,
        False,
        plan["work_meta_data"],
        plan["work_info_set"],
        plan["work_indptr"],
        plan["reduce_indptr"],
        plan["reduce_final_map"],
        plan["reduce_partial_map"],
        page_size=1,
        kv_granularity=16,
        max_seqlen_qo=1,
        uni_seqlen_qo=1,
        fast_mode=True,
        topk=-1,  # the entries are compacted, and starts says how many a row has
        max_split_per_batch=_MAX_SPLITS,
        intra_batch_mode=False,
        dtype_q=q.dtype,
        dtype_kv=kv.dtype,
    )
    return plan
