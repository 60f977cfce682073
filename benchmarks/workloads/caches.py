"""Writers of fp8: indexer preparation, stores, packing of whole rows, the quantizing norm; and the index keys' gather.

The caches hold random rows before the call, so a row that was not written cannot pass the check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, field_validator

from benchmarks.checked import Count, Heads
from benchmarks.timing.clock import input_sets
from benchmarks.workloads import base
from benchmarks.workloads.base import CacheFormat, Layout, Params, Problem, Workload
from nsa_backend_plugin.layouts import INDEX_PAGE_SIZE
from nsa_backend_plugin.ops import index_key_cache, indexer_prep, latent_cache, norm_quant
from nsa_backend_plugin.ops.index_key_cache import reference as index_reference
from nsa_backend_plugin.ops.latent_cache import reference as latent_reference
from tools.calls import Arguments, Calls, int32

MAX_POSITION = 16384


def _cos_sin(rope_dim: int, device: torch.device) -> torch.Tensor:
    """[MAX_POSITION, rope_dim] fp32: cosines, then sines, of DeepSeek's rotary angles."""
    frequency = 10000.0 ** (-torch.arange(0, rope_dim, 2, device=device) / rope_dim)
    angle = torch.arange(MAX_POSITION, device=device)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def build_prep(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Query preparation, then key preparation and store: what the indexer does before its logits."""
    tokens, heads, neox = params["tokens"], params["heads"], params["is_neox"]
    cos_sin = _cos_sin(64, device)
    pages = max(2 * -(-tokens // INDEX_PAGE_SIZE), params["pool_pages"])
    cache = base.index_pool(pages, device)
    shared = {"norm_weight": torch.rand(128, device=device) + 0.5, "norm_bias": torch.randn(128, device=device) * 0.1}
    make = Calls(device, plain=True)
    touched = tokens * (heads * (128 * 3 + 2 + 4) + 128 * 2 + base.INDEX_TOKEN_BYTES + 64 * 4)
    sets = input_sets(touched, tokens * heads * 128 * 2, device, at_least=params["min_sets"])

    def item() -> tuple[Arguments, Arguments]:
        query = {**make.indexer_prep_query(tokens, heads, angles=cos_sin), "is_neox": neox}
        key = make.indexer_prep_key_store(tokens, angles=cos_sin, cache=cache)
        return query, {**key, **shared, "is_neox": neox, "positions": query["positions"]}

    def run(impl: str | None, item: Any, poison: bool) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = item
        prepared = indexer_prep.query(**query, impl=impl)
        indexer_prep.key_store(**key, impl=impl)
        return prepared

    def check(out: tuple[torch.Tensor, torch.Tensor], item: Any) -> float:
        query, key = item
        expected = indexer_prep.query(**query, impl="torch")
        keys = _keys(cache, key["slots"], expected[0].dtype)
        indexer_prep.key_store(**key, impl="torch")
        return max(
            base.cosine_distance(_logit_scale(*out), _logit_scale(*expected)),
            base.cosine_distance(keys, _keys(cache, key["slots"], expected[0].dtype)),
        )

    return Problem(
        inputs=[item() for _ in range(sets)],
        run=run,
        check=check,
        bar=base.FP8_BAR,
        peer_bar=2e-3,  # the engine rounds to bf16 between its kernels, which moves fp8 values by a step
        checked=f"all {tokens} tokens, dequantized, against torch float32",
        bytes=touched,
        flops=2 * tokens * (heads + 1) * 128 * 128,
    )


def _logit_scale(q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Query times weight: how q and its folded scale enter a logit."""
    return q.float() * weights[..., None]


def _keys(cache: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    value, scale = index_reference.read(
        cache, slots.long(), layout="row_major", page_size=INDEX_PAGE_SIZE, fp8_dtype=dtype
    )
    return value.float() * scale[:, None]


def build_index_store(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Quantize index keys and write them into pages."""
    tokens, layout = params["tokens"], params["layout"]
    pages = max(2 * -(-tokens // INDEX_PAGE_SIZE), params["pool_pages"])
    cache = base.index_pool(pages, device)
    touched = tokens * (256 + base.INDEX_TOKEN_BYTES + 8)
    sets = input_sets(touched, tokens * 264, device, at_least=params["min_sets"])

    def read(slots: torch.Tensor) -> torch.Tensor:
        dtype = torch.float8_e4m3fn
        value, scale = index_reference.read(
            cache, slots.long(), layout=layout, page_size=INDEX_PAGE_SIZE, fp8_dtype=dtype
        )
        return torch.cat([value.view(torch.uint8), scale[:, None].contiguous().view(torch.uint8)], dim=1)

    def check(out: None, item: Any) -> float:
        written = read(item["slots"])
        index_key_cache.store(**item, impl="torch")
        return float((written != read(item["slots"])).float().mean())

    return Problem(
        inputs=[Calls(device, plain=True).index_key_cache_store(tokens, layout, cache=cache) for _ in range(sets)],
        run=base.runs(index_key_cache.store),
        check=check,
        bar=0.0,
        peer_bar=2e-3,  # share of bytes; the engine's kernel was seen to round up to 8e-4 of them differently
        checked=f"all {tokens} tokens, byte for byte",
        bytes=touched,
        flops=0,
    )


def build_index_gather(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Read the index keys of whole contexts out of their pages, as a prefill does before its ragged logits."""
    batch, context, layout = params["batch"], params["context"], params["layout"]
    pages = -(-context // INDEX_PAGE_SIZE)
    cache = base.index_pool(max(batch * pages, params["pool_pages"]), device)
    lengths = [context] * batch
    shared = {"seq_lens": int32(lengths, device), "total_tokens": batch * context}
    touched = 2 * batch * context * base.INDEX_TOKEN_BYTES + batch * pages * 4
    sets = input_sets(touched, batch * pages * 4, device, at_least=params["min_sets"])

    make = Calls(device, plain=True)

    def check(out: tuple[torch.Tensor, torch.Tensor], item: Any) -> float:
        pairs = list(zip(out, index_key_cache.gather(**item, impl="torch"), strict=True))
        if any(x.shape != y.shape for x, y in pairs):
            return float("inf")
        return max(float((x.view(torch.uint8) != y.view(torch.uint8)).float().mean()) for x, y in pairs)

    return Problem(
        inputs=[make.index_key_cache_gather(lengths, layout, cache=cache) | shared for _ in range(sets)],
        run=base.runs(index_key_cache.gather),
        check=check,
        bar=0.0,
        checked=f"all {batch * context} tokens, byte for byte",
        bytes=touched,
        flops=0,
    )


def build_latent_store(params: Mapping[str, Any], device: torch.device) -> Problem:
    """RoPE of the key's rotary part, quantization and the write into the latent cache."""
    tokens, kind = params["tokens"], params["kv"]
    cache = base.latent_pool(kind, max(params["pool_slots"], 2 * tokens), device)
    cos_sin = _cos_sin(64, device)
    row = base.ROW_BYTES["bf16"]
    touched = tokens * (row + base.ROW_BYTES[kind] + 8 + (8 + 256 if params["rope"] else 0))
    sets = input_sets(touched, tokens * row, device, at_least=params["min_sets"])
    make = Calls(device, plain=True)

    def rows(item: Any) -> torch.Tensor:
        picked = cache[item["slots"], 0]
        return latent_reference.unpack(picked, base.VALUE_DIM) if kind == "packed" else picked.float()

    def check(out: None, item: Any) -> float:
        stored = rows(item)
        latent_cache.store(**item, impl="torch")
        return base.cosine_distance(stored, rows(item))

    return Problem(
        inputs=[
            make.latent_cache_store(tokens, kind, rotated=params["rope"], angles=cos_sin, cache=cache)
            for _ in range(sets)
        ],
        run=base.runs(latent_cache.store),
        check=check,
        bar=base.FP8_BAR if kind == "packed" else base.BF16_BAR,
        checked=f"all {tokens} rows, dequantized, against torch float32",
        bytes=touched,
        flops=0,
    )


def build_quantize(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Pack rows into a fresh tensor (seed 004's job)."""

    def check(out: torch.Tensor, item: Any) -> float:
        actual, expected = (
            out.view(torch.uint8).reshape(params["tokens"], -1),
            latent_cache.quantize(**item, impl="torch"),
        )
        unpack = latent_reference.unpack
        return base.cosine_distance(unpack(actual, base.VALUE_DIM), unpack(expected, base.VALUE_DIM))

    make = Calls(device, plain=True).latent_cache_quantize
    return _rows_problem(params, device, latent_cache.quantize, make, check, base.FP8_BAR)


def build_dequantize(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Unpack rows into a fresh tensor."""

    def check(out: torch.Tensor, item: Any) -> float:
        return base.cosine_distance(out.float(), latent_cache.dequantize(**item, impl="torch").float())

    make = Calls(device, plain=True).latent_cache_dequantize
    return _rows_problem(params, device, latent_cache.dequantize, make, check, base.BF16_BAR)


def _rows_problem(params: Mapping[str, Any], device: torch.device, function, make, check, bar: float) -> Problem:
    tokens = params["tokens"]
    touched = tokens * (base.ROW_BYTES["bf16"] + base.ROW_BYTES["packed"])
    sets = input_sets(touched, tokens * base.ROW_BYTES["bf16"], device, at_least=params["min_sets"])
    return Problem(
        inputs=[make(tokens) for _ in range(sets)],
        run=base.runs(function),
        check=check,
        bar=bar,
        checked=f"all {tokens} rows against torch float32",
        bytes=touched,
        flops=0,
    )


def build_norm_quant(params: Mapping[str, Any], device: torch.device) -> Problem:
    """RMS norm of q_lora, a slice of the projection's output, quantized for the next GEMM."""
    tokens, width = params["tokens"], params["width"]
    make = Calls(device, plain=True)
    weight = make.norm_quant_rms(1, width)["weight"]
    touched = tokens * width * 3
    sets = input_sets(touched, tokens * width, device, at_least=params["min_sets"])

    def dequantized(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return values.float() * scales.repeat_interleave(norm_quant.GROUP, 1)

    def check(out: tuple[torch.Tensor, torch.Tensor], item: Any) -> float:
        return base.cosine_distance(dequantized(*out), dequantized(*norm_quant.rms(**item, impl="torch")))

    return Problem(
        inputs=[make.norm_quant_rms(tokens, width) | {"weight": weight} for _ in range(sets)],
        run=base.runs(norm_quant.rms),
        check=check,
        bar=base.FP8_BAR,
        checked=f"all {tokens} rows, dequantized, against torch float32",
        bytes=touched,
        flops=0,
    )


class Tokens(Params):
    tokens: Count = Field(64, description="rows to write")


class Prep(Tokens):
    tokens: Count = Field(1, description="tokens of the step")
    heads: Heads = Field(64, description="indexer heads")
    is_neox: bool = Field(False, description="rotary halves apart (NeoX) instead of interleaved")
    pool_pages: Count = Field(20_000, description="pages of the index-K cache, at least")


class IndexStore(Tokens):
    layout: Layout = Field("row_major", description="of the index-K cache")
    pool_pages: Count = Field(20_000, description="pages of the cache, at least")


class IndexGather(Params):
    batch: Count = Field(1, description="requests")
    context: Count = Field(8192, description="tokens of each request")
    layout: Layout = Field("row_major", description="of the index-K cache")
    pool_pages: Count = Field(20_000, description="pages of the cache, at least")


class LatentStore(Tokens):
    kv: CacheFormat = Field("packed", description="format of the latent cache")
    rope: bool = Field(True, description="rotate the key's rotary part in the same call")
    pool_slots: Count = Field(1_000_000, description="slots of the cache, at least")


class NormQuant(Tokens):
    width: Count = Field(1536, description="values of a row, a multiple of the quantization group")

    @field_validator("width")
    @classmethod
    def _whole_groups(cls, width: int) -> int:
        if width % norm_quant.GROUP:
            raise ValueError(f"{width}: expected a multiple of {norm_quant.GROUP}")
        return width


PREP = Workload("indexer_prep", ("indexer_prep.query", "indexer_prep.key_store"), build_prep, Prep)
INDEX_STORE = Workload("index_store", ("index_key_cache.store",), build_index_store, IndexStore, same_job=("layout",))
INDEX_GATHER = Workload(
    "index_gather",
    ("index_key_cache.gather",),
    build_index_gather,
    IndexGather,
    same_job=("layout",),
    batch=lambda params: int(params["batch"]),
)
LATENT_STORE = Workload("latent_store", ("latent_cache.store",), build_latent_store, LatentStore, same_job=("rope",))
NORM_QUANT = Workload("norm_quant", ("norm_quant.rms",), build_norm_quant, NormQuant)
QUANTIZE = Workload("latent_quantize", ("latent_cache.quantize",), build_quantize, Tokens)
DEQUANTIZE = Workload("latent_dequantize", ("latent_cache.dequantize",), build_dequantize, Tokens)
