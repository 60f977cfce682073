"""Weighted MQA logits of the indexer.

logit[t, s] = sum over heads h of weights[t, h] * relu(dot(q[t, h], k[s])) * k_scale[s]
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES, INDEX_DIM, INDEX_PAGE_SIZE
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops.index_key_cache import check_cache
from nsa_backend_plugin.ops.registry import Operation

#: Columns of slack behind each row of `paged`'s `out` that save a copy where AITER runs: its stores pass a row's end.
ROW_GUARD = 256

_paged = Operation("mqa_logits", "paged")
_ragged = Operation("mqa_logits", "ragged")


def paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
    *,
    layout: str = "row_major",
    page_size: int = INDEX_PAGE_SIZE,
    clean: bool = False,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Logits of decode queries against the paged index-K cache.

    q: [B, next_n, H, 128] fp8. cache: [pages, page_size*132] uint8. weights: [B*next_n, H] fp32.
    context_lens: [B] int32, where query j of a request sees its first context_len - (next_n-1-j) tokens, or
    [B, next_n] int32, each row's own count. block_table: [B, max_pages] int32.
    layout: of the cache; the writer's. clean: write -inf at and past each row's length (else undefined there).
    out: [B*next_n, >= max_context_len] fp32 to write into, row stride free; None allocates.
    Returns logits [B*next_n, max_context_len] fp32.
    Raises ValueError for bad shapes, dtypes, devices, names, and on CPU for lengths out of range.
    Source: DeepSeek-V3.2 lightning indexer; DeepGEMM fp8_paged_mqa_logits.
    """
    check_cache(cache, layout, page_size)
    checks.tensor("q", q, (None, None, None, INDEX_DIM), FP8_DTYPES, cache.device)
    checks.contiguous("q", q)
    batch, next_n, heads, _ = q.shape
    checks.tensor("weights", weights, (batch * next_n, heads), torch.float32, cache.device)
    flat = isinstance(context_lens, torch.Tensor) and context_lens.dim() == 1
    lens_shape = (batch,) if flat else (batch, next_n)
    checks.tensor("context_lens", context_lens, lens_shape, torch.int32, cache.device)
    checks.tensor("block_table", block_table, (batch, None), torch.int32, cache.device)
    checks.positive("max_context_len", max_context_len)
    checks.index_range("context_lens", context_lens, 0, min(max_context_len, block_table.shape[1] * page_size) + 1)
    out = _check_output(out, batch * next_n, max_context_len, q.device)
    return _paged(
        impl,
        q.device,
        {"batch": batch, "next_n": next_n, "heads": heads, "layout": layout, "context": max_context_len},
        q,
        cache,
        weights,
        context_lens,
        block_table,
        max_context_len,
        layout=layout,
        page_size=page_size,
        clean=clean,
        out=out,
    )


def ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_start: torch.Tensor,
    row_end: torch.Tensor,
    *,
    clean: bool = False,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Logits of prefill queries against gathered keys; row t sees columns row_start[t] <= s < row_end[t].

    q: [T, H, 128] fp8. k: [S, 128] fp8. k_scale: [S] fp32. weights: [T, H] fp32. row_start, row_end: [T] int32.
    clean: write -inf outside each row's range (else undefined there). out: [T, >= S] fp32 to write into.
    Returns logits [T, S] fp32. Raises ValueError for bad shapes, dtypes or devices, and on CPU for ranges.
    Source: DeepSeek-V3.2 lightning indexer; DeepGEMM fp8_mqa_logits.
    """
    checks.tensor("q", q, (None, None, INDEX_DIM), FP8_DTYPES)
    checks.contiguous("q", q)
    tokens, heads, _ = q.shape
    checks.tensor("k", k, (None, INDEX_DIM), q.dtype, q.device)
    checks.contiguous("k", k)
    checks.tensor("k_scale", k_scale, (k.shape[0],), torch.float32, q.device)
    checks.tensor("weights", weights, (tokens, heads), torch.float32, q.device)
    checks.tensor("row_start", row_start, (tokens,), torch.int32, q.device)
    checks.tensor("row_end", row_end, (tokens,), torch.int32, q.device)
    checks.index_range("row_start", row_start, 0, k.shape[0] + 1)
    checks.index_range("row_end", row_end, 0, k.shape[0] + 1)
    out = _check_output(out, tokens, k.shape[0], q.device)
    shape = {"tokens": tokens, "heads": heads, "context": k.shape[0]}
    return _ragged(impl, q.device, shape, q, k, k_scale, weights, row_start, row_end, clean=clean, out=out)


def new_logits(out: torch.Tensor | None, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """The caller's output, or a new one. Implementations allocate: DeepGEMM returns a tensor of its own."""
    return torch.empty(rows, columns, dtype=torch.float32, device=device) if out is None else out


def finish(
    logits: torch.Tensor, out: torch.Tensor | None, clean: bool, row_start: torch.Tensor | None, row_end: torch.Tensor
) -> torch.Tensor:
    """For vendor kernels that allocate their result: -inf outside each row's range if asked, and a copy into `out`."""
    if clean:
        column = torch.arange(logits.shape[1], device=logits.device)
        outside = column >= row_end[:, None]
        logits.masked_fill_(outside if row_start is None else outside | (column < row_start[:, None]), float("-inf"))
    return logits if out is None else out.copy_(logits)


def _check_output(out: torch.Tensor | None, rows: int, columns: int, device: torch.device) -> torch.Tensor | None:
    if out is None:
        return None
    checks.tensor("out", out, (rows, None), torch.float32, device)
    checks.inner_contiguous("out", out)
    checks.require(out.shape[1] >= columns, "out.shape[1]", out.shape[1], f"at least {columns}")
    return out[:, :columns]
