"""Dense MLA decode over whole contexts in a paged latent cache.

A request with q_len > 1 (speculative decoding) becomes q_len rows that share the request's pages, each seeing one
token more than the row before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from benchmarks.batch_spec import parse_batch_spec
from benchmarks.checked import BatchSpec, Count, Heads
from benchmarks.timing.clock import input_sets
from benchmarks.workloads import base
from benchmarks.workloads.base import DenseFormat, Params, Problem, Workload
from nsa_backend_plugin.ops import dense_mla
from nsa_backend_plugin.ops.call import Step
from tools import calls
from tools.calls import Arguments, Calls


def build(params: Mapping[str, Any], device: torch.device) -> Problem:
    heads, page = params["heads"], params["page_size"]
    requests = parse_batch_spec(params["batch_spec"])
    counts = [-(-r.kv_len // page) for r in requests]
    pages = max(params["pool_slots"] // page, sum(counts))
    kv = params["kv"]
    pool = base.latent_pool(kv, pages * page, device)
    lengths = [r.context_len + j + 1 for r in requests for j in range(r.q_len)]
    rows = len(lengths)

    q_bytes = rows * heads * base.HEAD_DIM * 2
    table_bytes = rows * max(counts) * 4
    kv_bytes = sum(r.kv_len for r in requests) * base.ROW_BYTES[kv]
    touched = kv_bytes + q_bytes + table_bytes + rows * heads * base.VALUE_DIM * 2
    sets = input_sets(touched, q_bytes + table_bytes, device, at_least=params["min_sets"])
    make, contexts, new = Calls(device), [r.kv_len for r in requests], [r.q_len for r in requests]
    shared = {
        "seq_lens": calls.int32(lengths, device),  # the same tensor, which the schedules of a step belong to
        "num_kv_splits": params["num_kv_splits"],
        "rows_have_keys": True,
        "kv_is_finite": True,
        "step": Step(),
    }

    def item() -> Arguments:
        return make.dense_mla_decode(contexts, heads, page, kv, kv_scale=1.0, new_tokens=new, kv=pool) | shared

    def check(out: torch.Tensor, item: Any) -> float:
        q, table = item["q"], item["block_table"]
        picked = base.some_rows(rows, device)
        slots = [calls.row_slots(table[r], lengths[r], page) for r in picked.tolist()]
        latents = [pool.view(torch.uint8)[slot, 0].view(pool.dtype).float() for slot in slots]
        expected = [reference_row(q[r], latent) for r, latent in zip(picked.tolist(), latents, strict=True)]
        return base.cosine_distance(out[picked].float(), torch.stack(expected))

    return Problem(
        inputs=[item() for _ in range(sets)],
        run=base.runs(dense_mla.decode, rows, heads, base.VALUE_DIM),
        check=check,
        bar=base.BF16_BAR,
        checked=base.rows_checked(rows),
        bytes=touched,
        flops=2 * heads * sum(lengths) * (base.HEAD_DIM + base.VALUE_DIM),
        extra={"lengths": lengths},
    )


def reference_row(q: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """q [H, 576], latent [S, 576] -> [H, 512] in float32."""
    scores = torch.softmax(q.float() @ latent.T * calls.SOFTMAX_SCALE, dim=-1)
    return scores @ latent[:, : base.VALUE_DIM]


class Dense(Params):
    batch_spec: BatchSpec = Field("8q1s1k", description="requests; each new token of one is a row")
    heads: Heads = Field(128, description="query heads")
    page_size: Count = Field(64, description="tokens per page")
    kv: DenseFormat = Field("bf16", description="format of the latent cache")
    num_kv_splits: Count | None = Field(None, description="splits of each context (null: the kernel's choice)")
    pool_slots: Count = Field(1_200_000, description="slots of the latent cache, at least")


WORKLOAD = Workload(
    "dense_decode",
    ("dense_mla.decode",),
    build,
    Dense,
    same_job=("kv",),
    batch=lambda params: len(parse_batch_spec(params["batch_spec"])),
)
