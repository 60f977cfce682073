"""Weighted MQA logits of the indexer.

logit[t, s] = sum over heads h of weights[t, h] * relu(dot(q[t, h], k[s])) * k_scale[s]

Accuracy: the products of a dot are exact, but their sum is what the matrix unit makes of it. Hopper's (sm_90) takes 32
products at a time, and adds them and the sum so far with about 13 bits below the largest of them; what lies lower is
cut off. A dot of 128 products is four such steps, so it may be off by (128 + 4) * 2**-13 = 1.6% of its largest product
or partial sum. Values of one magnitude stay far below that; where one of 128 is about 100 times the rest, 0.8% was
measured (H200). A logit adds this up over its heads, each with its weight. DeepGEMM and our Triton kernels issue the
same four instructions and neither adds the steps up in fp32 instead, so neither is the better one. The torch reference
sums in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES, INDEX_DIM, INDEX_PAGE_SIZE
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops._torch import index_pages
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.call import Call, Fact, Step
from nsa_backend_plugin.ops.dispatch import operation

#: Columns of slack behind each row of `paged`'s `out` that save a copy where AITER runs: its stores pass a row's end.
ROW_GUARD = 256


@dataclass(slots=True, eq=False, kw_only=True)
class Logits(Call[torch.Tensor]):
    """What calls of both functions have: logits [rows, columns] to write, into `out` where the caller gave it."""

    q: torch.Tensor
    weights: torch.Tensor
    clean: bool
    out: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the result."""
        raise NotImplementedError

    def output(self) -> torch.Tensor:
        """The caller's output, or a new one."""
        return torch.empty(self.shape, dtype=torch.float32, device=self.q.device) if self.out is None else self.out

    def finish(self, logits: torch.Tensor, row_start: torch.Tensor | None, row_end: torch.Tensor) -> torch.Tensor:
        """The result, from a vendor's own tensor: -inf outside each row's range if asked, in `out` where given."""
        if self.clean:
            column = torch.arange(logits.shape[1], device=logits.device)
            outside = column >= row_end[:, None]
            outside = outside if row_start is None else outside | (column < row_start[:, None])
            logits.masked_fill_(outside, float("-inf"))
        return logits if self.out is None or logits is self.out else self.out.copy_(logits)


@dataclass(slots=True, eq=False, kw_only=True)
class Paged(Logits):
    """The arguments of `paged`."""

    cache: torch.Tensor
    context_lens: torch.Tensor
    block_table: torch.Tensor
    max_context_len: int
    layout: str
    page_size: int

    def facts(self) -> Mapping[str, Fact]:
        batch, next_n, heads, _ = self.q.shape
        return {
            "batch": batch,
            "next_n": next_n,
            "heads": heads,
            "context": self.max_context_len,
            "layout": self.layout,
            "page_size": self.page_size,
            "clean": self.clean,
        }

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0] * self.q.shape[1], self.max_context_len


@dataclass(slots=True, eq=False, kw_only=True)
class Ragged(Logits):
    """The arguments of `ragged`."""

    k: torch.Tensor
    k_scale: torch.Tensor
    row_start: torch.Tensor
    row_end: torch.Tensor

    def facts(self) -> Mapping[str, Fact]:
        tokens, heads, _ = self.q.shape
        return {"tokens": tokens, "heads": heads, "context": self.k.shape[0], "clean": self.clean}

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.k.shape[0]


@operation
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
    step: Step | None = None,
    impl: str | None = None,
) -> Paged:
    """Logits of decode queries against the paged index-K cache.

    q: [B, next_n, H, 128] fp8, contiguous. cache: [pages, page_size*132] uint8. weights: [B*next_n, H] fp32, any
    strides.
    context_lens: [B] int32, where query j of a request sees its first context_len - (next_n-1-j) tokens, or
    [B, next_n] int32, each row's own count; any strides. The contents must not change within a `step`.
    block_table: [B, max_pages] int32, rows strided freely; entries past a request's pages may hold anything.
    layout: of the cache; the writer's. clean: write -inf at and past each row's length (else undefined there).
    out: [B*next_n, >= max_context_len] fp32 to write into, row stride free; None: a new tensor, of any row stride.
    Returns logits [B*next_n, max_context_len] fp32; their accuracy: the module's docstring.
    Raises ValueError for bad shapes, dtypes, strides, devices, names, and on CPU for lengths or pages out of range.
    Source: DeepSeek-V3.2 lightning indexer; DeepGEMM fp8_paged_mqa_logits.
    """
    index_pages.check(cache, layout, page_size)
    checks.tensor("q", q, (None, None, None, INDEX_DIM), FP8_DTYPES, cache.device)
    checks.contiguous("q", q)
    batch, next_n, heads, _ = q.shape
    checks.require(heads > 0, "q.shape[2]", heads, "at least 1 head")
    checks.tensor("weights", weights, (batch * next_n, heads), torch.float32, cache.device)
    flat = isinstance(context_lens, torch.Tensor) and context_lens.dim() == 1
    lens_shape = (batch,) if flat else (batch, next_n)
    checks.tensor("context_lens", context_lens, lens_shape, torch.int32, cache.device)
    checks.tensor("block_table", block_table, (batch, None), torch.int32, cache.device)
    checks.inner_contiguous("block_table", block_table)
    checks.positive("max_context_len", max_context_len)
    checks.index_range("context_lens", context_lens, 0, min(max_context_len, block_table.shape[1] * page_size) + 1)
    checks.used_pages("block_table", block_table, context_lens, page_size, cache.shape[0])
    checks.choice("clean", clean, (False, True))
    return Paged(
        arch=device_arch(q.device),
        step=step or Step(),
        impl=impl,
        q=q,
        cache=cache,
        weights=weights,
        context_lens=context_lens,
        block_table=block_table,
        max_context_len=max_context_len,
        layout=layout,
        page_size=page_size,
        clean=clean,
        out=_checked_output(out, batch * next_n, max_context_len, q.device),
    )


@operation
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
    step: Step | None = None,
    impl: str | None = None,
) -> Ragged:
    """Logits of prefill queries against gathered keys; row t sees columns row_start[t] <= s < row_end[t].

    q: [T, H, 128] fp8 and k: [S, 128] of the same fp8, both contiguous. k_scale: [S] fp32. weights: [T, H] fp32.
    row_start, row_end: [T] int32. These four: any strides.
    clean: write -inf outside each row's range (else undefined there). out: [T, >= S] fp32 to write into, row stride
    free; None: a new tensor, of any row stride.
    Returns logits [T, S] fp32; their accuracy: the module's docstring.
    Raises ValueError for bad shapes, dtypes, strides or devices, and on CPU for ranges.
    Source: DeepSeek-V3.2 lightning indexer; DeepGEMM fp8_mqa_logits.
    """
    checks.tensor("q", q, (None, None, INDEX_DIM), FP8_DTYPES)
    checks.contiguous("q", q)
    tokens, heads, _ = q.shape
    checks.require(heads > 0, "q.shape[1]", heads, "at least 1 head")
    checks.tensor("k", k, (None, INDEX_DIM), q.dtype, q.device)
    checks.contiguous("k", k)
    checks.tensor("k_scale", k_scale, (k.shape[0],), torch.float32, q.device)
    checks.tensor("weights", weights, (tokens, heads), torch.float32, q.device)
    checks.tensor("row_start", row_start, (tokens,), torch.int32, q.device)
    checks.tensor("row_end", row_end, (tokens,), torch.int32, q.device)
    checks.index_range("row_start", row_start, 0, k.shape[0] + 1)
    checks.index_range("row_end", row_end, 0, k.shape[0] + 1)
    checks.choice("clean", clean, (False, True))
    return Ragged(
        arch=device_arch(q.device),
        step=step or Step(),
        impl=impl,
        q=q,
        k=k,
        k_scale=k_scale,
        weights=weights,
        row_start=row_start,
        row_end=row_end,
        clean=clean,
        out=_checked_output(out, tokens, k.shape[0], q.device),
    )


def _checked_output(out: torch.Tensor | None, rows: int, columns: int, device: torch.device) -> torch.Tensor | None:
    if out is None:
        return None
    checks.tensor("out", out, (rows, None), torch.float32, device)
    checks.inner_contiguous("out", out)
    checks.require(out.shape[1] >= columns, "out.shape[1]", out.shape[1], f"at least {columns}")
    apart = rows < 2 or out.stride(0) >= columns
    checks.require(apart, "out.stride(0)", out.stride(0), f"at least {columns}, so that rows do not overlap")
    return out[:, :columns]
