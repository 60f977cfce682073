"""Sparse MLA attention: decode (every query has its own tokens) and prefill (all queries select from one context)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, model_validator

from benchmarks.checked import Count, Heads, Percent
from benchmarks.timing.clock import input_sets
from benchmarks.workloads import base
from benchmarks.workloads.base import CacheFormat, Params, Problem, QueriesOfContext, Workload
from nsa_backend_plugin.ops import sparse_mla
from nsa_backend_plugin.ops.call import Step
from tools.calls import SOFTMAX_SCALE, Arguments, Calls


def build_decode(params: Mapping[str, Any], device: torch.device) -> Problem:
    tokens, topk = params["tokens"], params["topk"]
    pool = base.latent_pool(params["kv"], max(params["pool_slots"], tokens * topk), device)

    def indices() -> tuple[torch.Tensor, None]:
        picked = torch.randperm(pool.shape[0], device=device)[: tokens * topk]
        return picked.int().view(tokens, topk), None

    return _problem(params, pool, indices, rows_read=tokens * topk, device=device)


def build_prefill(params: Mapping[str, Any], device: torch.device) -> Problem:
    """The last `tokens` queries of a context of `context` tokens; query t selects among what it sees, by itself or,
    with `overlap`, most of what the query before it has selected."""
    tokens, topk, context = params["tokens"], params["topk"], params["context"]
    pool = base.latent_pool(params["kv"], max(params["pool_slots"], context), device)

    def neighbours(slots: torch.Tensor) -> torch.Tensor:
        """Windows that move over the rows that all queries see, in random order: each drops the oldest of its rows."""
        seen = slots[torch.randperm(context - tokens + 1, device=device)]
        step = topk - round(topk * params["overlap"] / 100)
        parts = []
        for first in range(0, tokens, 256):
            query = torch.arange(first, min(first + 256, tokens), device=device)[:, None]
            place = torch.rand(query.shape[0], topk, device=device).argsort(dim=1)
            parts.append(seen[(query * step + place) % seen.shape[0]])
        return torch.cat(parts).contiguous()

    def indices() -> tuple[torch.Tensor, torch.Tensor | None]:
        slots = torch.randperm(pool.shape[0], device=device)[:context].int()
        listed = slots if params["listed"] else None
        if params["overlap"]:
            return neighbours(slots), listed
        position = torch.arange(context, device=device)
        parts = []
        for first in range(0, tokens, 256):
            queries = torch.arange(first, min(first + 256, tokens), device=device)
            score = torch.rand(queries.numel(), context, device=device)
            score[position > context - tokens + queries[:, None]] = -1.0
            best = score.topk(min(topk, context), dim=1, sorted=False)
            picked = torch.where(best.values < 0, -1, slots[best.indices])
            parts.append(torch.nn.functional.pad(picked, (0, topk - picked.shape[1]), value=-1))
        return torch.cat(parts).contiguous(), listed

    return _problem(params, pool, indices, rows_read=min(context, tokens * topk), device=device)


def _problem(params: Mapping[str, Any], pool: torch.Tensor, indices, rows_read: int, device: torch.device) -> Problem:
    tokens, heads, topk = params["tokens"], params["heads"], params["topk"]
    q_bytes = tokens * heads * base.HEAD_DIM * 2
    index_bytes = tokens * topk * 4
    touched = rows_read * base.ROW_BYTES[params["kv"]] + q_bytes + index_bytes + tokens * heads * base.VALUE_DIM * 2
    sets = input_sets(touched, q_bytes + index_bytes, device, at_least=params["min_sets"])
    make, promises = Calls(device), {"rows_have_keys": True, "step": Step()}

    def arguments() -> Arguments:
        index, listed = indices()
        return make.sparse_mla_attend(tokens, heads, topk, kv=pool, indices=index) | promises | {"context": listed}

    def check(out: torch.Tensor, item: Any) -> float:
        q, index = item["q"], item["indices"]
        rows = base.some_rows(tokens, device)
        expected = sparse_mla.attend(q[rows].float(), pool, index[rows], SOFTMAX_SCALE, impl="torch")
        assert isinstance(expected, torch.Tensor)
        return base.cosine_distance(out[rows].float(), expected)

    return Problem(
        inputs=[arguments() for _ in range(sets)],
        run=base.runs(sparse_mla.attend, tokens, heads, base.VALUE_DIM),
        check=check,
        bar=base.FP8_BAR if params["kv"] == "packed" else base.BF16_BAR,
        checked=base.rows_checked(tokens),
        bytes=touched,
        flops=2 * tokens * heads * topk * (base.HEAD_DIM + base.VALUE_DIM),
    )


class Decode(Params):
    tokens: Count = Field(1, description="queries, each with its own selected rows")
    heads: Heads = Field(16, description="query heads")
    topk: Count = Field(2048, description="rows that a query selects")
    kv: CacheFormat = Field("bf16", description="format of the latent cache")
    pool_slots: Count = Field(1_200_000, description="slots of the cache, at least")


class Prefill(QueriesOfContext):
    tokens: Count = Field(2048, description="queries, the last ones of the context")
    heads: Heads = Field(16, description="query heads")
    topk: Count = Field(2048, description="rows that a query selects")
    context: Count = Field(32768, description="tokens that the queries select from")
    overlap: Percent = Field(0, description="percent of its rows that a query shares with the one before; 0: by chance")
    listed: bool = Field(False, description="whether the caller says which slots may be selected, as serving does")
    kv: CacheFormat = Field("bf16", description="format of the latent cache")
    pool_slots: Count = Field(1_200_000, description="slots of the cache, at least")

    @model_validator(mode="after")
    def _enough_rows_to_share(self) -> Prefill:
        if self.overlap and self.context - self.tokens < 2 * self.topk:
            raise ValueError(f"overlap={self.overlap}: expected context - tokens of at least 2 * topk={2 * self.topk}")
        return self


DECODE = Workload("sparse_decode", ("sparse_mla.attend",), build_decode, Decode, same_job=("kv",))
PREFILL = Workload("sparse_prefill", ("sparse_mla.attend",), build_prefill, Prefill, same_job=("kv",))
