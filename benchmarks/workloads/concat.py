"""Concatenations of MLA: the prefill key (nope | rope over all heads) and the absorbed query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field

from benchmarks.checked import Count, Heads
from benchmarks.timing.clock import input_sets
from benchmarks.workloads import base
from benchmarks.workloads.base import Params, Problem, Workload
from nsa_backend_plugin.ops import concat
from tools.calls import Arguments, Calls

DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def build_mla_k(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Keys of a prefill, into one output."""
    tokens, heads, dtype = params["tokens"], params["heads"], DTYPES[params["dtype"]]
    size = dtype.itemsize
    touched = tokens * size * (heads * 128 + 64 + heads * 192)
    sets = input_sets(touched, tokens * size * heads * 256, device, at_least=params["min_sets"], cap=8)
    out, make = torch.empty(tokens, heads, 192, dtype=dtype, device=device), Calls(device, dtype, plain=True)

    def check(result: torch.Tensor, item: Any) -> float:
        expected = concat.mla_k(**{**item, "out": torch.empty_like(out)}, impl="torch")
        return 0.0 if torch.equal(result.view(torch.uint8), expected.view(torch.uint8)) else 1.0

    return Problem(
        inputs=[make.concat_mla_k(tokens, heads) | {"out": out} for _ in range(sets)],
        run=base.runs(concat.mla_k),
        check=check,
        bar=0.0,
        checked=f"all {tokens} tokens, byte for byte",
        bytes=touched,
        flops=0,
    )


def build_q_all(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Absorbed query; with joined=True the parts already lie in one buffer and no kernel should run."""
    tokens, heads = params["tokens"], params["heads"]
    touched = 2 * tokens * heads * 576 * 2
    sets = input_sets(touched, touched // 2, device, at_least=params["min_sets"])

    def item() -> Arguments:
        whole = Calls(device).rows(tokens, heads, 576)
        nope, rope = whole[..., :512], whole[..., 512:]
        return {
            "q_nope": nope if params["joined"] else nope.contiguous(),
            "q_rope": rope if params["joined"] else rope.contiguous(),
        }

    def check(result: torch.Tensor, item: Any) -> float:
        return 0.0 if torch.equal(result, torch.cat([item["q_nope"], item["q_rope"]], dim=-1)) else 1.0

    return Problem(
        inputs=[item() for _ in range(sets)],
        run=base.runs(concat.q_all),
        check=check,
        bar=0.0,
        checked=f"all {tokens} tokens, exactly",
        bytes=0 if params["joined"] else touched,
        flops=0,
    )


class MlaK(Params):
    tokens: Count = Field(512, description="tokens of the prefill")
    heads: Heads = Field(128, description="query heads")
    dtype: Literal["bf16", "fp8"] = Field("bf16", description="of the key")


class QAll(Params):
    tokens: Count = Field(64, description="tokens of the step")
    heads: Heads = Field(16, description="query heads")
    joined: bool = Field(False, description="the parts already lie in one buffer, so that no kernel should run")


MLA_K = Workload("concat_k", ("concat.mla_k",), build_mla_k, MlaK)
Q_ALL = Workload("concat_q", ("concat.q_all",), build_q_all, QAll)
