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
from tools.calls import Calls

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
    make, dtype = Calls(device, plain=True), torch.bfloat16 if fp8 else torch.float32
    shared = {**make.projection_linear(tokens, rows, depth, fp8, norm), "dtype": dtype}
    del shared["weight"]
    bar = FP8_BAR if fp8 else BF16_BAR

    def check(out: torch.Tensor, item: Any) -> float:
        return base.cosine_distance(out.float(), projection.linear(**item, impl="torch").float())

    return Problem(
        inputs=[make.projection_linear(tokens, rows, depth, fp8) | shared for _ in range(sets)],
        run=base.runs(projection.linear),
        check=check,
        bar=bar,
        peer_bar=bar,
        checked=f"all {tokens} rows against torch float32",
        bytes=touched,
        flops=2 * tokens * rows * depth,
    )


def build_per_head(params: Mapping[str, Any], device: torch.device) -> Problem:
    """W_UK or W_UV, straight into a part of wider rows."""
    tokens, heads = params["tokens"], params["heads"]
    rows, depth = (512, NOPE) if params["name"] == "w_uk" else (NOPE, 512)
    touched = heads * (rows * depth + tokens * (rows + depth)) * 2
    sets = input_sets(touched, touched, device, at_least=params["min_sets"])
    make = Calls(device, plain=True)
    shared = {
        "x": make.projection_per_head(tokens, heads, 1, depth)["x"],
        "out": torch.empty(tokens, heads, rows + 64, dtype=torch.bfloat16, device=device)[..., :rows],
    }

    def check(result: torch.Tensor, item: Any) -> float:
        expected = projection.per_head(item["x"], item["weight"], impl="torch")
        return base.cosine_distance(result.float(), expected.float())

    return Problem(
        inputs=[make.projection_per_head(tokens, heads, rows, depth) | shared for _ in range(sets)],
        run=base.runs(projection.per_head),
        check=check,
        bar=BF16_BAR,
        peer_bar=BF16_BAR,
        checked=f"all {tokens} rows against torch float32",
        bytes=touched,
        flops=2 * tokens * heads * rows * depth,
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
