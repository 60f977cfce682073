"""Ordinary attention (MHA, GQA) over a paged KV cache. The library has no such operation: every backend is a peer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, model_validator

from benchmarks.batch_spec import parse_batch_spec
from benchmarks.checked import BatchSpec, Count, Heads
from benchmarks.timing.clock import input_sets
from benchmarks.workloads import base
from benchmarks.workloads.base import Params, Problem, Workload
from tools.calls import block_table, row_slots


def build(params: Mapping[str, Any], device: torch.device) -> Problem:
    heads, kv_heads, dim, page = (params[k] for k in ("heads", "kv_heads", "head_dim", "page_size"))
    requests = parse_batch_spec(params["batch_spec"])
    tokens, kv_tokens = sum(r.q_len for r in requests), sum(r.kv_len for r in requests)
    contexts = [r.kv_len for r in requests]
    pages = max(params["pool_slots"] // page, sum(-(-n // page) for n in contexts))
    shape = (pages, page, kv_heads, dim)
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    q_bytes = tokens * heads * dim * 2
    touched = 2 * kv_tokens * kv_heads * dim * 2 + 2 * q_bytes
    sets = input_sets(touched, q_bytes, device, at_least=params["min_sets"])
    inputs = [
        (
            torch.randn(tokens, heads, dim, device=device).to(torch.bfloat16),
            block_table(contexts, page, device, pages)[0],
        )
        for _ in range(sets)
    ]
    owners = [(i, r.context_len + j + 1) for i, r in enumerate(requests) for j in range(r.q_len)]

    def run(impl: str | None, item: Any, poison: bool) -> torch.Tensor:
        raise ValueError(f"impl={impl!r}: no operation of the library does ordinary attention")

    def check(out: torch.Tensor, item: Any) -> float:
        q, table = item
        rows = base.some_rows(tokens, device).tolist()
        expected = []
        for t in rows:
            request, length = owners[t]
            slots = row_slots(table[request], length, page)
            k, v = (
                x.view(-1, kv_heads, dim)[slots].float().repeat_interleave(heads // kv_heads, 1) for x in (keys, values)
            )
            scores = torch.softmax(torch.einsum("hd,shd->hs", q[t].float(), k) * dim**-0.5, dim=-1)
            expected.append(torch.einsum("hs,shd->hd", scores, v))
        return base.cosine_distance(out[rows].float(), torch.stack(expected))

    seen = sum(length for _, length in owners)
    return Problem(
        inputs=inputs,
        run=run,
        check=check,
        bar=base.BF16_BAR,
        checked=base.rows_checked(tokens),
        bytes=touched,
        flops=4 * seen * heads * dim,
        extra={
            "keys": keys,
            "values": values,
            "requests": requests,
            "page_size": page,
        },
    )


class Standard(Params):
    batch_spec: BatchSpec = Field("8q1s1k", description="requests, any mix")
    heads: Heads = Field(32, description="query heads, a multiple of kv_heads")
    kv_heads: Heads = Field(8, description="key and value heads")
    head_dim: Count = Field(128, description="values of a head")
    page_size: Count = Field(16, description="tokens per page")
    pool_slots: Count = Field(300_000, description="slots of the cache, at least")

    @model_validator(mode="after")
    def _whole_groups(self) -> Standard:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads}: expected a multiple of kv_heads={self.kv_heads}")
        return self


WORKLOAD = Workload("standard", (), build, Standard, batch=lambda params: len(parse_batch_spec(params["batch_spec"])))
