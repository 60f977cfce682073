"""AITER's MLA decode, shared by the adapters of `sparse_mla` and `dense_mla`. Checked against a fake, not run on AMD.

`aiter.mla.mla_decode_fwd` reads ragged page lists of page size 1 and takes 16 to 128 heads in multiples of 16. With
fp8 rows it also wants a work plan, made on the device from the ragged starts: once per step, where those are.

The plan is the one of SGLang 0.5.23. That of 0.5.17 (`fast_mode=False`, `intra_batch_mode=True`, `topk` given) takes
the compacted slots for a table of fixed width and gave wrong plans at long contexts (SGLang pull request 39083).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES
from nsa_backend_plugin.ops._torch.mla import MlaCall, Result
from nsa_backend_plugin.ops._vendor import mla, probe
from nsa_backend_plugin.ops.call import Reason

ARCHS = ("gfx942", "gfx950")
_MAX_SPLITS = 64
_MAX_BYTES = 1 << 32
_PLAN = ("get_mla_metadata_info_v1", "get_mla_metadata_v1")


def available(arch: str) -> Reason:
    if arch not in ARCHS:
        return f"AITER's MLA decode needs {' or '.join(ARCHS)}, not {arch}"
    return probe.missing("aiter", *_PLAN) or probe.missing("aiter.mla", "mla_decode_fwd")


def limits(call: MlaCall) -> Reason:
    size = call.kv.numel() * call.kv.element_size()
    if size > _MAX_BYTES:  # its offsets into the cache have 32 bits and wrap without a word (aiter 2768, 5765)
        return f"kv of {size} bytes: at most 4 GiB only"
    return mla.limits(call)


def starts(counts: torch.Tensor) -> torch.Tensor:
    """[T + 1] int32: where each row's entries start in the ragged list, for counts [T]."""
    result = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, dim=0, out=result[1:])
    return result


def entries(values: torch.Tensor, valid: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """[T*K] int32: the valid values [T, K] of all rows, one after the other.

    The device alone decides how many there are, so that a CUDA graph can capture it: invalid values all go to one
    spare place at the end.
    """
    rows, width = values.shape
    place = torch.where(valid, starts[:-1, None] + valid.cumsum(dim=1) - 1, rows * width)
    result = torch.zeros(rows * width + 1, dtype=torch.int32, device=values.device)
    result.scatter_(0, place.view(-1), values.reshape(-1))
    return result[:-1]


def decode(call: MlaCall, entries: torch.Tensor, starts: torch.Tensor) -> Result:
    """One query per row over kv[entries[starts[t] : starts[t + 1]]]."""
    from aiter.mla import mla_decode_fwd

    rows, heads, dim = call.q.shape
    device, value_dim = call.q.device, call.value_dim
    padded = mla.pad_heads(call.q, -(-heads // 16) * 16)
    query_starts = mla.query_starts(call)
    ones = partial(torch.ones, rows, dtype=torch.int32, device=device)
    last_page_lens = call.step.once(("aiter last pages", rows), ones, device=device)
    out = call.output() if padded is call.q else call.q.new_empty(rows, padded.shape[1], value_dim)
    extra: dict[str, Any] = {}
    if call.kv.dtype in FP8_DTYPES:
        key = ("aiter plan", padded.shape[1], call.kv.dtype)
        extra = dict(call.step.once(key, lambda: _plan(padded, call.kv, query_starts, starts, last_page_lens), starts))
        for name, value in (("q_scale", 1.0), ("kv_scale", call.kv_unit)):
            number = partial(torch.full, (), value, dtype=torch.float32, device=device)
            extra[name] = call.step.once(("number", value), number, device=device)
    mla_decode_fwd(
        padded,
        call.kv.view(-1, 1, 1, dim),
        out,
        query_starts,
        starts,
        entries,
        last_page_lens,
        1,
        sm_scale=call.softmax_scale,
        **extra,
    )
    return mla.finish(call, out, None, lambda: starts[1:] == starts[:-1])


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
