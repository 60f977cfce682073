"""Concatenations of MLA: the prefill key (nope | rope over all heads) and the absorbed query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field

from benchmarks.checked import Count, Heads
from benchmarks.timing.clock import input_sets
from benchmarks.workloads.base import Params, Problem, Workload, poisoned
from nsa_backend_plugin.ops import concat

DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random values of any dtype, made in chunks to keep the bf16 intermediate small."""
    out = torch.empty(*shape, dtype=dtype, device=device)
    for chunk in out.split(8192):
        chunk.copy_(torch.randn(chunk.shape, dtype=torch.bfloat16, device=device))
    return out


def build_mla_k(params: Mapping[str, Any], device: torch.device) -> Problem:
    """k_nope is a slice of kv_b_proj's output [T, H, 128 + 128], as in DeepSeek's prefill."""
    tokens, heads, dtype = params["tokens"], params["heads"], DTYPES[params["dtype"]]
    size = dtype.itemsize
    touched = tokens * size * (heads * 128 + 64 + heads * 192)
    sets = input_sets(touched, tokens * size * heads * 256, device, at_least=params["min_sets"], cap=8)
    inputs = [
        (
            _random(tokens, heads, 256, dtype=dtype, device=device)[..., :128],
            _random(tokens, 1, 64, dtype=dtype, device=device),
        )
        for _ in range(sets)
    ]
    out = torch.empty(tokens, heads, 192, dtype=dtype, device=device)

    def run(impl: str | None, item: Any, poison: bool) -> torch.Tensor:
        if poison:
            out.copy_(poisoned(1, dtype=torch.bfloat16, device=device))
        return concat.mla_k(*item, out=out, impl=impl)

    def check(result: torch.Tensor, item: Any) -> float:
        nope, rope = item
        expected = torch.empty_like(out)
        concat.mla_k(nope, rope, out=expected, impl="torch")
        return 0.0 if torch.equal(result.view(torch.uint8), expected.view(torch.uint8)) else 1.0

    return Problem(
        inputs=inputs,
        run=run,
        check=check,
        bar=0.0,
        checked=f"all {tokens} tokens, byte for byte",
        bytes=touched,
        flops=0,
        extra={"out": out},
    )


def build_q_all(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Absorbed query; with joined=True the parts already lie in one buffer and no kernel should run."""
    tokens, heads = params["tokens"], params["heads"]
    touched = 2 * tokens * heads * 576 * 2
    sets = input_sets(touched, touched // 2, device, at_least=params["min_sets"])

    def item() -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.randn(tokens, heads, 576, device=device).to(torch.bfloat16)
        nope, rope = whole[..., :512], whole[..., 512:]
        return (nope, rope) if params["joined"] else (nope.contiguous(), rope.contiguous())

    def run(impl: str | None, item: Any, poison: bool) -> torch.Tensor:
        return concat.q_all(*item, impl=impl)

    def check(result: torch.Tensor, item: Any) -> float:
        return 0.0 if torch.equal(result, torch.cat(item, dim=-1)) else 1.0

    return Problem(
        inputs=[item() for _ in range(sets)],
        run=run,
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
