"""The indexer: paged and ragged logits, top-k, and the chain of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from benchmarks.checked import Count, Heads
from benchmarks.timing.clock import input_sets
from benchmarks.workloads import base
from benchmarks.workloads.base import Layout, Params, Problem, QueriesOfContext, Workload
from nsa_backend_plugin.layouts import INDEX_DIM, INDEX_PAGE_SIZE
from nsa_backend_plugin.ops import mqa_logits, topk
from nsa_backend_plugin.ops.arch import fp8_dtype
from nsa_backend_plugin.ops.call import Step

#: Share of selected tokens that may differ from the reference's: logits near the threshold differ in the last bits.
CHAIN_BAR = 5e-3


#: Pages of a served cache: 2.9 GB, so that reading random pages of it misses the TLB as it does in a server.
SERVED_PAGES = 340_000


def _pool(pages_needed: int, device: torch.device) -> torch.Tensor:
    """A cache with room for the case, on a GPU as large as a served one."""
    return base.index_pool(max(pages_needed, SERVED_PAGES if device.type == "cuda" else 0), device)


def _queries(rows: int, next_n: int, heads: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.randn(rows, next_n, heads, INDEX_DIM, device=device).to(fp8_dtype(device))
    return q, torch.randn(rows * next_n, heads, device=device)


def build_paged(params: Mapping[str, Any], device: torch.device) -> Problem:
    batch, context, heads, next_n = params["batch"], params["context"], params["heads"], params["next_n"]
    pages = -(-context // INDEX_PAGE_SIZE)
    pool = _pool(batch * pages, device)
    lens = torch.full((batch,), context, dtype=torch.int32, device=device)
    rows = batch * next_n
    touched = batch * context * base.INDEX_TOKEN_BYTES + rows * (heads * (INDEX_DIM + 4) + context * 4)
    sets = input_sets(touched, rows * heads * (INDEX_DIM + 4) + batch * pages * 4, device, at_least=params["min_sets"])
    inputs = [
        (*_queries(batch, next_n, heads, device), base.own_pages([pages] * batch, pool.shape[0], device))
        for _ in range(sets)
    ]

    step = Step()

    def run(impl: str | None, item: Any, poison: bool) -> torch.Tensor:
        q, weights, table = item
        out = base.poisoned(rows, pages * INDEX_PAGE_SIZE, dtype=torch.float32, device=device) if poison else None
        layout = params["layout"]
        return mqa_logits.paged(q, pool, weights, lens, table, context, layout=layout, out=out, step=step, impl=impl)

    def check(out: torch.Tensor, item: Any) -> float:
        q, weights, table = item
        worst = 0.0
        for b in {0, batch - 1}:
            part = slice(b * next_n, (b + 1) * next_n)
            expected = mqa_logits.paged(
                q[b : b + 1],
                pool,
                weights[part],
                lens[b : b + 1],
                table[b : b + 1],
                context,
                layout=params["layout"],
                clean=True,
                impl="torch",
            )
            seen = expected.isfinite()
            worst = max(worst, base.cosine_distance(out[part, :context][seen], expected[seen]))
        return worst

    return Problem(
        inputs=inputs,
        run=run,
        check=check,
        bar=base.FP8_BAR,
        checked=f"{min(batch, 2)} of {batch} requests against torch float32",
        bytes=touched,
        flops=2 * rows * context * heads * INDEX_DIM,
        extra={
            "pool": pool,
            "lens": lens,
            "pages": pages,
        },
    )


def build_ragged(params: Mapping[str, Any], device: torch.device) -> Problem:
    """One prefill of `tokens` queries at the end of `context` gathered keys."""
    tokens, context, heads = params["tokens"], params["context"], params["heads"]
    start = torch.zeros(tokens, dtype=torch.int32, device=device)
    end = torch.arange(context - tokens + 1, context + 1, dtype=torch.int32, device=device)
    touched = context * base.INDEX_TOKEN_BYTES + tokens * (heads * (INDEX_DIM + 4) + context * 4)
    sets = input_sets(
        touched,
        context * base.INDEX_TOKEN_BYTES + tokens * heads * (INDEX_DIM + 4),
        device,
        at_least=params["min_sets"],
    )

    def item() -> tuple[torch.Tensor, ...]:
        q, weights = _queries(tokens, 1, heads, device)
        k = torch.randn(context, INDEX_DIM, device=device).to(fp8_dtype(device))
        return q[:, 0].contiguous(), k, torch.rand(context, device=device) * 0.02 + 0.005, weights

    def run(impl: str | None, item: Any, poison: bool) -> torch.Tensor:
        q, k, scale, weights = item
        out = base.poisoned(tokens, context, dtype=torch.float32, device=device) if poison else None
        return mqa_logits.ragged(q, k, scale, weights, start, end, out=out, impl=impl)

    def check(out: torch.Tensor, item: Any) -> float:
        q, k, scale, weights = item
        rows = base.some_rows(tokens, device)
        expected = mqa_logits.ragged(q[rows], k, scale, weights[rows], start[rows], end[rows], clean=True, impl="torch")
        seen = expected.isfinite()
        return base.cosine_distance(out[rows][seen], expected[seen])

    return Problem(
        inputs=[item() for _ in range(sets)],
        run=run,
        check=check,
        bar=base.FP8_BAR,
        checked=base.rows_checked(tokens),
        bytes=touched,
        flops=2 * int(end.sum()) * heads * INDEX_DIM,
    )


def build_topk(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Selection from rows of `context` logits in a buffer `width` wide (what a server allocates), as physical slots,
    or as positions where there is no page table."""
    rows, context, k = params["rows"], params["context"], params["k"]
    width = max(params["width"] or context, context)
    pages = -(-context // INDEX_PAGE_SIZE)
    lens = torch.full((rows,), context, dtype=torch.int32, device=device)
    table = base.own_pages([pages] * rows, rows * pages + 1, device)
    page_table: dict[str, Any] = {"page_table": table, "page_size": INDEX_PAGE_SIZE} if params["page_table"] else {}
    column_of_page = torch.full((rows * pages + 1,), -1, dtype=torch.long, device=device)
    column_of_page[table.long()] = torch.arange(pages, device=device).expand(rows, -1)
    touched = rows * context * 4 + bool(page_table) * rows * pages * 4 + rows * k * 4
    sets = input_sets(touched, rows * width * 4, device, at_least=params["min_sets"])

    def logits() -> torch.Tensor:
        buffer = torch.empty(rows, width, device=device)
        buffer[:, :context].normal_()
        buffer[:, context:] = float("nan")
        return buffer

    step = Step()

    def run(impl: str | None, item: torch.Tensor, poison: bool) -> torch.Tensor:
        out = base.poisoned(rows, k, dtype=torch.int32, device=device) if poison else None
        return topk.select(
            item,
            lens,
            k,
            deterministic=params["deterministic"],
            out=out,
            step=step,
            impl=impl,
            **page_table,
        )

    def check(out: torch.Tensor, item: torch.Tensor) -> float:
        """Share of selected logits that are not among the true k largest; all rows are checked."""
        wanted = min(k, context)
        selected = out[:, :wanted].sort(dim=1).values.long()
        page = (selected // INDEX_PAGE_SIZE).clamp(0, rows * pages)
        position = column_of_page[page] * INDEX_PAGE_SIZE + selected % INDEX_PAGE_SIZE if page_table else selected
        own = (position >= 0) & (position < context) & (selected >= 0)
        repeated = (selected[:, 1:] == selected[:, :-1]).sum()
        values = item.gather(1, position.clamp(0, context - 1)).masked_fill(~own, float("-inf"))
        best = item[:, :context].topk(wanted, dim=1).values
        wrong = (values.sort(dim=1, descending=True).values != best).sum() + repeated
        padded = (out[:, wanted:] != -1).sum()
        return float(wrong + padded) / (rows * k)

    return Problem(
        inputs=[logits() for _ in range(sets)],
        run=run,
        check=check,
        bar=0.0,
        checked=f"the set of all {rows} rows against torch.topk",
        bytes=touched,
        flops=0,
        extra={"lens": lens, "table": table, "k": k},
    )


def build_chain(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Logits, then top-k as physical slots: what one decode step of one layer does."""
    batch, context, heads, k = params["batch"], params["context"], params["heads"], params["k"]
    pages = -(-context // INDEX_PAGE_SIZE)
    pool = _pool(batch * pages, device)
    lens = torch.full((batch,), context, dtype=torch.int32, device=device)
    touched = batch * context * base.INDEX_TOKEN_BYTES + batch * heads * (INDEX_DIM + 4) + batch * k * 4
    sets = input_sets(touched, batch * heads * (INDEX_DIM + 4) + batch * pages * 4, device, at_least=params["min_sets"])
    inputs = [
        (*_queries(batch, 1, heads, device), base.own_pages([pages] * batch, pool.shape[0], device))
        for _ in range(sets)
    ]

    step = Step()

    def run(impl: str | None, item: Any, poison: bool) -> torch.Tensor:
        q, weights, table = item
        first, last = impl.split("+") if impl in CHAIN.mixed else (impl, impl)
        layout = params["layout"]
        logits = mqa_logits.paged(q, pool, weights, lens, table, context, layout=layout, step=step, impl=first)
        out = base.poisoned(batch, k, dtype=torch.int32, device=device) if poison else None
        return topk.select(logits, lens, k, page_table=table, page_size=INDEX_PAGE_SIZE, out=out, step=step, impl=last)

    def check(out: torch.Tensor, item: Any) -> float:
        q, weights, table = item
        wrong, total = 0, 0
        for b in {0, batch - 1}:
            row = slice(b, b + 1)
            logits = mqa_logits.paged(
                q[row], pool, weights[row], lens[row], table[row], context, layout=params["layout"], impl="torch"
            )
            expected = topk.select(logits, lens[row], k, page_table=table[row], page_size=INDEX_PAGE_SIZE, impl="torch")
            wrong += k - int(torch.isin(expected[expected >= 0], out[b]).sum()) - int((expected < 0).sum())
            total += k
        return wrong / total

    return Problem(
        inputs=inputs,
        run=run,
        check=check,
        bar=CHAIN_BAR,
        checked=f"the sets of {min(batch, 2)} of {batch} requests against torch float32",
        bytes=touched,
        flops=2 * batch * context * heads * INDEX_DIM,
        extra={
            "pool": pool,
            "lens": lens,
            "pages": pages,
            "k": k,
        },
    )


class Paged(Params):
    batch: Count = Field(1, description="requests")
    context: Count = Field(8192, description="tokens of each request")
    heads: Heads = Field(64, description="indexer heads")
    next_n: Count = Field(1, description="queries per request (speculative decoding)")
    layout: Layout = Field("row_major", description="of the index-K cache")


class Ragged(QueriesOfContext):
    tokens: Count = Field(1024, description="queries, the last ones of the context")
    context: Count = Field(8192, description="keys")
    heads: Heads = Field(64, description="indexer heads")


class TopK(Params):
    rows: Count = Field(1, description="rows of logits")
    context: Count = Field(8192, description="logits of a row")
    k: Count = Field(2048, description="how many are selected")
    width: Count | None = Field(None, description="columns of the buffer (null: the context), at least the context")
    deterministic: bool = Field(False, description="ties broken the same way in every run")
    page_table: bool = Field(True, description="physical slots through a page table instead of positions")


class Chain(Params):
    batch: Count = Field(1, description="requests")
    context: Count = Field(8192, description="tokens of each request")
    heads: Heads = Field(64, description="indexer heads")
    k: Count = Field(2048, description="how many tokens are selected")
    layout: Layout = Field("row_major", description="of the index-K cache")


def _batch(params: Mapping[str, Any]) -> int:
    return int(params["batch"])


PAGED = Workload("logits_paged", ("mqa_logits.paged",), build_paged, Paged, same_job=("layout",), batch=_batch)
RAGGED = Workload("logits_ragged", ("mqa_logits.ragged",), build_ragged, Ragged)
TOPK = Workload("topk", ("topk.select",), build_topk, TopK, batch=lambda params: int(params["rows"]))
CHAIN = Workload(
    "indexer_chain",
    ("mqa_logits.paged", "topk.select"),
    build_chain,
    Chain,
    same_job=("layout",),
    mixed=("triton+cuda", "deep_gemm+sglang_topk_v2"),
    batch=_batch,
)
