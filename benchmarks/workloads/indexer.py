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
from nsa_backend_plugin.ops.call import Step
from tools.calls import Arguments, Calls, block_table, int32, poison

#: Share of selected tokens that may differ from the reference's: logits near the threshold differ in the last bits.
CHAIN_BAR = 5e-3


#: Pages of a served cache: 2.9 GB, so that reading random pages of it misses the TLB as it does in a server.
SERVED_PAGES = 340_000


def _pool(pages_needed: int, device: torch.device) -> torch.Tensor:
    """A cache with room for the case, on a GPU as large as a served one."""
    return base.index_pool(max(pages_needed, SERVED_PAGES if device.type == "cuda" else 0), device)


def _paged(params: Mapping[str, Any], device: torch.device, sets: int) -> list[Arguments]:
    """Inputs of the paged logits; their lengths are the same tensor, which the schedules of a step belong to."""
    lengths, next_n = [params["context"]] * params["batch"], params.get("next_n", 1)
    pool = _pool(params["batch"] * -(-params["context"] // INDEX_PAGE_SIZE), device)
    shared = {"context_lens": int32(lengths, device), "step": Step()}
    make = Calls(device, plain=True)
    return [
        make.mqa_logits_paged(lengths, params["heads"], next_n, params["layout"], cache=pool) | shared
        for _ in range(sets)
    ]


def _of_request(item: Arguments, b: int, next_n: int = 1) -> Arguments:
    rows = {name: item[name][b : b + 1] for name in ("q", "context_lens", "block_table")}
    return {**item, **rows, "weights": item["weights"][b * next_n : (b + 1) * next_n], "impl": "torch"}


def build_paged(params: Mapping[str, Any], device: torch.device) -> Problem:
    batch, context, heads, next_n = params["batch"], params["context"], params["heads"], params["next_n"]
    pages, rows = -(-context // INDEX_PAGE_SIZE), batch * next_n
    touched = batch * context * base.INDEX_TOKEN_BYTES + rows * (heads * (INDEX_DIM + 4) + context * 4)
    sets = input_sets(touched, rows * heads * (INDEX_DIM + 4) + batch * pages * 4, device, at_least=params["min_sets"])

    def check(out: torch.Tensor, item: Any) -> float:
        worst = 0.0
        for b in {0, batch - 1}:
            part = slice(b * next_n, (b + 1) * next_n)
            expected = mqa_logits.paged(**_of_request(item, b, next_n), clean=True)
            seen = expected.isfinite()
            worst = max(worst, base.cosine_distance(out[part, :context][seen], expected[seen]))
        return worst

    return Problem(
        inputs=_paged(params, device, sets),
        run=base.runs(mqa_logits.paged, rows, pages * INDEX_PAGE_SIZE, dtype=torch.float32),
        check=check,
        bar=base.FP8_BAR,
        checked=f"{min(batch, 2)} of {batch} requests against torch float32",
        bytes=touched,
        flops=2 * rows * context * heads * INDEX_DIM,
    )


def build_ragged(params: Mapping[str, Any], device: torch.device) -> Problem:
    """One prefill of `tokens` queries at the end of `context` gathered keys."""
    tokens, context, heads = params["tokens"], params["context"], params["heads"]
    touched = context * base.INDEX_TOKEN_BYTES + tokens * (heads * (INDEX_DIM + 4) + context * 4)
    sets = input_sets(
        touched,
        context * base.INDEX_TOKEN_BYTES + tokens * heads * (INDEX_DIM + 4),
        device,
        at_least=params["min_sets"],
    )

    make = Calls(device, plain=True)

    def check(out: torch.Tensor, item: Any) -> float:
        rows = base.some_rows(tokens, device)
        part = {name: item[name][rows] for name in ("q", "weights", "row_start", "row_end")}
        expected = mqa_logits.ragged(**(item | part), clean=True, impl="torch")
        seen = expected.isfinite()
        return base.cosine_distance(out[rows][seen], expected[seen])

    return Problem(
        inputs=[make.mqa_logits_ragged(tokens, context, heads) for _ in range(sets)],
        run=base.runs(mqa_logits.ragged, tokens, context, dtype=torch.float32),
        check=check,
        bar=base.FP8_BAR,
        checked=base.rows_checked(tokens),
        bytes=touched,
        flops=tokens * (2 * context - tokens + 1) * heads * INDEX_DIM,
    )


def build_topk(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Selection from rows of `context` logits in a buffer `width` wide (what a server allocates), as physical slots,
    or as positions where there is no page table."""
    rows, context, k = params["rows"], params["context"], params["k"]
    width = max(params["width"] or context, context)
    pages = -(-context // INDEX_PAGE_SIZE)
    lengths = [context] * rows
    table, _ = block_table(lengths, INDEX_PAGE_SIZE, device, rows * pages + 1)
    page_table: Arguments = {"page_table": table, "page_size": INDEX_PAGE_SIZE} if params["page_table"] else {}
    column_of_page = torch.full((rows * pages + 1,), -1, dtype=torch.long, device=device)
    column_of_page[table.long()] = torch.arange(pages, device=device).expand(rows, -1)
    touched = rows * context * 4 + bool(page_table) * rows * pages * 4 + rows * k * 4
    sets = input_sets(touched, rows * width * 4, device, at_least=params["min_sets"])

    shared = {"lengths": int32(lengths, device), "deterministic": params["deterministic"], "step": Step(), **page_table}

    def check(out: torch.Tensor, item: Any) -> float:
        """Share of selected logits that are not among the true k largest; all rows are checked."""
        wanted = min(k, context)
        selected = out[:, :wanted].sort(dim=1).values.long()
        page = (selected // INDEX_PAGE_SIZE).clamp(0, rows * pages)
        position = column_of_page[page] * INDEX_PAGE_SIZE + selected % INDEX_PAGE_SIZE if page_table else selected
        own = (position >= 0) & (position < context) & (selected >= 0)
        repeated = (selected[:, 1:] == selected[:, :-1]).sum()
        logits = item["logits"]
        values = logits.gather(1, position.clamp(0, context - 1)).masked_fill(~own, float("-inf"))
        best = logits[:, :context].topk(wanted, dim=1).values
        wrong = (values.sort(dim=1, descending=True).values != best).sum() + repeated
        padded = (out[:, wanted:] != -1).sum()
        return float(wrong + padded) / (rows * k)

    return Problem(
        inputs=[Calls(device).topk_select(lengths, width, k, pad=0) | shared for _ in range(sets)],
        run=base.runs(topk.select, rows, k, dtype=torch.int32),
        check=check,
        bar=0.0,
        checked=f"the set of all {rows} rows against torch.topk",
        bytes=touched,
        flops=0,
    )


def build_chain(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Logits, then top-k as physical slots: what one decode step of one layer does."""
    batch, context, heads, k = params["batch"], params["context"], params["heads"], params["k"]
    pages = -(-context // INDEX_PAGE_SIZE)
    touched = batch * context * base.INDEX_TOKEN_BYTES + batch * heads * (INDEX_DIM + 4) + batch * k * 4
    sets = input_sets(touched, batch * heads * (INDEX_DIM + 4) + batch * pages * 4, device, at_least=params["min_sets"])

    def select(logits: torch.Tensor, item: Arguments, **options: Any) -> torch.Tensor:
        pages = {"page_table": item["block_table"], "page_size": INDEX_PAGE_SIZE}
        return topk.select(logits, item["context_lens"], k, **pages, step=item["step"], **options)

    def run(impl: str | None, item: Any, poisoned: bool) -> torch.Tensor:
        first, last = impl.split("+") if impl in CHAIN.mixed else (impl, impl)
        logits = mqa_logits.paged(**item, impl=first)
        out = poison(batch, k, dtype=torch.int32, device=device) if poisoned else None
        return select(logits, item, out=out, impl=last)

    def check(out: torch.Tensor, item: Any) -> float:
        wrong, total = 0, 0
        for b in {0, batch - 1}:
            part = _of_request(item, b)
            expected = select(mqa_logits.paged(**part), part, impl="torch")
            wrong += k - int(torch.isin(expected[expected >= 0], out[b]).sum()) - int((expected < 0).sum())
            total += k
        return wrong / total

    return Problem(
        inputs=_paged(params, device, sets),
        run=run,
        check=check,
        bar=CHAIN_BAR,
        checked=f"the sets of {min(batch, 2)} of {batch} requests against torch float32",
        bytes=touched,
        flops=2 * batch * context * heads * INDEX_DIM,
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
