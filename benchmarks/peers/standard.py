"""Backends of ordinary attention: torch, FlashAttention-3, FlashInfer and SGLang's Triton decode."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

from benchmarks.workloads.base import Problem
from tools.calls import int32, row_slots

Call = Callable[[Any], Any]


def sdpa(problem: Problem) -> Call:
    """torch's scaled_dot_product_attention, one request at a time; gathers the pages first, as torch must."""
    keys, values, requests = (problem.extra[k] for k in ("keys", "values", "requests"))
    page, device = problem.extra["page_size"], keys.device
    flat = [x.view(-1, *x.shape[2:]) for x in (keys, values)]
    shapes = {(r.q_len, r.kv_len) for r in requests}
    seen = {s: torch.ones(s, dtype=torch.bool, device=device).tril(s[1] - s[0]) for s in shapes}

    def call(item: Any) -> torch.Tensor:
        q, table = item
        outputs, first = [], 0
        for i, r in enumerate(requests):
            slots = row_slots(table[i], r.kv_len, page)
            part = q[first : first + r.q_len].transpose(0, 1)[None]
            k, v = (x[slots].transpose(0, 1)[None] for x in flat)
            out = torch.nn.functional.scaled_dot_product_attention(
                part, k, v, attn_mask=seen[r.q_len, r.kv_len], enable_gqa=True
            )
            outputs.append(out[0].transpose(0, 1))
            first += r.q_len
        return torch.cat(outputs)

    return call


def flash(problem: Problem) -> Call:
    """FlashAttention-3 over the paged cache (sgl_kernel)."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    keys, values, requests = (problem.extra[k] for k in ("keys", "values", "requests"))
    lens = int32([r.kv_len for r in requests], keys.device)
    starts = int32([0, *accumulate(r.q_len for r in requests)], keys.device)
    longest = max(r.q_len for r in requests)

    def call(item: Any) -> torch.Tensor:
        q, table = item
        return flash_attn_with_kvcache(
            q=q,
            k_cache=keys,
            v_cache=values,
            page_table=table,
            cache_seqlens=lens,
            cu_seqlens_q=starts,
            max_seqlen_q=longest,
            causal=True,
        )

    return call


def flashinfer(problem: Problem) -> Call:
    """FlashInfer's paged prefill wrapper, which also does decode rows; planned once, page list copied per call."""
    import flashinfer as library

    keys, values, requests = (problem.extra[k] for k in ("keys", "values", "requests"))
    page, device = problem.extra["page_size"], keys.device
    counts = [-(-r.kv_len // page) for r in requests]
    heads, kv_heads, dim = problem.inputs[0][0].shape[1], keys.shape[2], keys.shape[3]
    pages = torch.empty(sum(counts), dtype=torch.int32, device=device)
    starts = int32([0, *accumulate(r.q_len for r in requests)], device)
    page_starts = int32([0, *accumulate(counts)], device)
    last = int32([(r.kv_len - 1) % page + 1 for r in requests], device)
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device=device),
        "NHD",
        use_cuda_graph=True,
        qo_indptr_buf=starts.clone(),
        paged_kv_indptr_buf=page_starts.clone(),
        paged_kv_indices_buf=pages,
        paged_kv_last_page_len_buf=last.clone(),
    )
    wrapper.plan(
        starts, page_starts, pages.clone(), last, heads, kv_heads, dim, page, causal=True, q_data_type=keys.dtype
    )
    lists = {id(t): torch.cat([t[i, :n] for i, n in enumerate(counts)]) for _, t in problem.inputs}

    def call(item: Any) -> torch.Tensor:
        q, table = item
        pages.copy_(lists[id(table)])
        return wrapper.run(q, (keys, values))

    return call


def triton(problem: Problem) -> Call:
    """SGLang's Triton decode kernel, which takes one query per request."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    keys, values, requests = (problem.extra[k] for k in ("keys", "values", "requests"))
    page, device, dim = problem.extra["page_size"], keys.device, keys.shape[3]
    rows, heads, splits = len(requests), problem.inputs[0][0].shape[1], 16
    partial = torch.empty(rows, heads, splits, dim, device=device)
    partial_lse = torch.empty(rows, heads, splits, device=device)
    counts = torch.full((rows,), splits, dtype=torch.int32, device=device)
    starts = int32([0, *accumulate(r.kv_len for r in requests)], device)
    out = torch.empty(rows, heads, dim, dtype=keys.dtype, device=device)
    slots = {
        id(t): torch.cat([row_slots(t[i], r.kv_len, page) for i, r in enumerate(requests)]) for _, t in problem.inputs
    }
    flat_keys, flat_values = (x.view(-1, *x.shape[2:]) for x in (keys, values))

    def call(item: Any) -> torch.Tensor:
        q, table = item
        decode_attention_fwd(
            q,
            flat_keys,
            flat_values,
            out,
            starts,
            slots[id(table)],
            partial,
            partial_lse,
            counts,
            splits,
            dim**-0.5,
            1.0,
            1.0,
        )
        return out

    return call
