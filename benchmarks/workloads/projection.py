"""A layer's projections of few tokens: products with weights that are read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field

from benchmarks.checked import Count, Heads
from benchmarks.timing.clock import input_sets
from benchmarks.workloads import base
from benchmarks.workloads.base import Params, Problem, Workload
from nsa_backend_plugin.ops import projection

HIDDEN, Q_LORA, LATENT, NOPE, INDEX = 7168, 1536, 576, 128, 64 * 128
BF16_BAR = 5e-6
#: Tokens are quantized to fp8 by everyone: a value beside a rounding's edge moves by up to 1 of 16.
FP8_BAR = 2e-3
#: Name -> (rows, depth) of the weights of DeepSeek-V3.2 with `heads` query heads on a GPU, fp8, normalized tokens.
SHAPES = {
    "q_a_kv_a": (lambda heads: (Q_LORA + LATENT, HIDDEN), True, False),
    "q_b_wq_b": (lambda heads: (heads * (NOPE + 64) + INDEX, Q_LORA), True, True),
    "o_proj": (lambda heads: (HIDDEN, heads * NOPE), True, False),
    "wk_weights_proj": (lambda heads: (NOPE + 64, HIDDEN), False, False),
}


def build_linear(params: Mapping[str, Any], device: torch.device) -> Problem:
    """One of the layer's projections, each call with other weights."""
    tokens = params["tokens"]
    sizes, fp8, norm = SHAPES[params["name"]]
    rows, depth = sizes(params["heads"])
    touched = rows * depth * (1 if fp8 else 2) + tokens * (rows + depth) * 2
    sets = input_sets(touched, rows * depth * 2, device, at_least=params["min_sets"])
    x = torch.randn(tokens, depth, device=device).to(torch.bfloat16)
    dtype = torch.bfloat16 if fp8 else torch.float32
    gain = (torch.rand(depth, device=device) + 0.5).to(torch.bfloat16) if norm else None
    scale = torch.rand(-(-rows // 128), depth // 128, device=device) + 0.5 if fp8 else None
    kind, bar = (torch.float8_e4m3fn, FP8_BAR) if fp8 else (torch.bfloat16, BF16_BAR)
    weights = [torch.randn(rows, depth, device=device).to(kind) for _ in range(sets)]

    def run(impl: str | None, item: torch.Tensor, poison: bool) -> torch.Tensor:
        return projection.linear(x, item, scale, norm_weight=gain, dtype=dtype, impl=impl)

    def check(out: torch.Tensor, item: torch.Tensor) -> float:
        return base.cosine_distance(out.float(), run("torch", item, False).float())

    return Problem(
        inputs=weights,
        run=run,
        check=check,
        bar=bar,
        peer_bar=bar,
        checked=f"all {tokens} rows against torch float32",
        bytes=touched,
        flops=2 * tokens * rows * depth,
        extra={"x": x, "scale": scale, "gain": gain},
    )


def build_per_head(params: Mapping[str, Any], device: torch.device) -> Problem:
    """W_UK or W_UV, straight into a part of wider rows."""
    tokens, heads = params["tokens"], params["heads"]
    rows, depth = (512, NOPE) if params["name"] == "w_uk" else (NOPE, 512)
    touched = heads * (rows * depth + tokens * (rows + depth)) * 2
    sets = input_sets(touched, touched, device, at_least=params["min_sets"])
    x = torch.randn(tokens, heads, depth + 64, device=device).to(torch.bfloat16)[..., :depth]
    out = torch.empty(tokens, heads, rows + 64, dtype=torch.bfloat16, device=device)[..., :rows]
    weights = [torch.randn(heads, rows, depth, device=device).to(torch.bfloat16) for _ in range(sets)]

    def run(impl: str | None, item: torch.Tensor, poison: bool) -> torch.Tensor:
        if poison:
            out.fill_(float("nan"))
        return projection.per_head(x, item, out=out, impl=impl)

    def check(result: torch.Tensor, item: torch.Tensor) -> float:
        expected = projection.per_head(x, item, impl="torch")
        return base.cosine_distance(result.float(), expected.float())

    return Problem(
        inputs=weights,
        run=run,
        check=check,
        bar=BF16_BAR,
        peer_bar=BF16_BAR,
        checked=f"all {tokens} rows against torch float32",
        bytes=touched,
        flops=2 * tokens * heads * rows * depth,
        extra={"x": x, "out": out},
    )


class Linear(Params):
    name: Literal["q_a_kv_a", "q_b_wq_b", "o_proj", "wk_weights_proj"] = Field(
        "q_a_kv_a", description="which of the layer's projections"
    )
    tokens: Count = Field(1, description="tokens of the step")
    heads: Heads = Field(16, description="query heads")


class PerHead(Params):
    name: Literal["w_uk", "w_uv"] = Field("w_uk", description="which of the layer's weights")
    tokens: Count = Field(1, description="tokens of the step")
    heads: Heads = Field(16, description="query heads")


LINEAR = Workload("projection", ("projection.linear",), build_linear, Linear)
PER_HEAD = Workload("projection_per_head", ("projection.per_head",), build_per_head, PerHead)
