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

MAX_POSITION = 16384


def _cos_sin(rope_dim: int, device: torch.device) -> torch.Tensor:
    """[MAX_POSITION, rope_dim] fp32: cosines, then sines, of DeepSeek's rotary angles."""
    frequency = 10000.0 ** (-torch.arange(0, rope_dim, 2, device=device) / rope_dim)
    angle = torch.arange(MAX_POSITION, device=device)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def _bf16(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(torch.bfloat16)


def build_prep(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Query preparation, then key preparation and store: what the indexer does before its logits."""
    tokens, heads, neox = params["tokens"], params["heads"], params["is_neox"]
    cos_sin = _cos_sin(64, device)
    pages = max(2 * -(-tokens // INDEX_PAGE_SIZE), params["pool_pages"])
    cache = base.index_pool(pages, device)
    weight, bias = torch.rand(128, device=device) + 0.5, torch.randn(128, device=device) * 0.1
    touched = tokens * (heads * (128 * 3 + 2 + 4) + 128 * 2 + base.INDEX_TOKEN_BYTES + 64 * 4)
    sets = input_sets(touched, tokens * heads * 128 * 2, device, at_least=params["min_sets"])
    inputs = [
        (
            _bf16(tokens, heads, 128, device=device),
            _bf16(tokens, 128, device=device),
            _bf16(tokens, heads, device=device),
            torch.randint(MAX_POSITION, (tokens,), device=device),
            torch.randperm(pages * INDEX_PAGE_SIZE, device=device)[:tokens],
        )
        for _ in range(sets)
    ]
    weight_scale = 128**-0.5 * heads**-0.5

    def run(impl: str | None, item: Any, poison: bool) -> tuple[torch.Tensor, torch.Tensor]:
        q, key, gate, positions, slots = item
        prepared = indexer_prep.query(q, gate, positions, cos_sin, weight_scale=weight_scale, is_neox=neox, impl=impl)
        indexer_prep.key_store(key, weight, bias, positions, cos_sin, cache, slots, is_neox=neox, impl=impl)
        return prepared

    def check(out: tuple[torch.Tensor, torch.Tensor], item: Any) -> float:
        q, key, gate, positions, slots = item
        expected_q, expected_weights = indexer_prep.query(
            q, gate, positions, cos_sin, weight_scale=weight_scale, is_neox=neox, impl="torch"
        )
        stored = _keys(cache, slots, expected_q.dtype)
        expected_cache = torch.zeros_like(cache[: -(-tokens // INDEX_PAGE_SIZE)])
        own = torch.arange(tokens, device=device)
        indexer_prep.key_store(key, weight, bias, positions, cos_sin, expected_cache, own, is_neox=neox, impl="torch")
        expected_keys = _keys(expected_cache, own, expected_q.dtype)
        return max(
            base.cosine_distance(_logit_scale(*out), _logit_scale(expected_q, expected_weights)),
            base.cosine_distance(stored, expected_keys),
        )

    return Problem(
        inputs=inputs,
        run=run,
        check=check,
        bar=base.FP8_BAR,
        peer_bar=2e-3,  # the engine rounds to bf16 between its kernels, which moves fp8 values by a step
        checked=f"all {tokens} tokens, dequantized, against torch float32",
        bytes=touched,
        flops=2 * tokens * (heads + 1) * 128 * 128,
        extra={
            "cache": cache,
            "cos_sin": cos_sin,
            "weight": weight,
            "bias": bias,
            "weight_scale": weight_scale,
            "is_neox": neox,
        },
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
    inputs = [
        (_bf16(tokens, 128, device=device), torch.randperm(pages * INDEX_PAGE_SIZE, device=device)[:tokens])
        for _ in range(sets)
    ]

    def read(slots: torch.Tensor) -> torch.Tensor:
        dtype = torch.float8_e4m3fn
        value, scale = index_reference.read(
            cache, slots.long(), layout=layout, page_size=INDEX_PAGE_SIZE, fp8_dtype=dtype
        )
        return torch.cat([value.view(torch.uint8), scale[:, None].contiguous().view(torch.uint8)], dim=1)

    def run(impl: str | None, item: Any, poison: bool) -> torch.Tensor:
        key, slots = item
        index_key_cache.store(key, cache, slots, layout=layout, impl=impl)
        return cache

    def check(out: torch.Tensor, item: Any) -> float:
        key, slots = item
        stored = read(slots).clone()
        index_key_cache.store(key, cache, slots, layout=layout, impl="torch")
        return float((stored != read(slots)).float().mean())

    return Problem(
        inputs=inputs,
        run=run,
        check=check,
        bar=0.0,
        peer_bar=2e-3,  # share of bytes; the engine's kernel was seen to round up to 8e-4 of them differently
        checked=f"all {tokens} tokens, byte for byte",
        bytes=touched,
        flops=0,
        extra={"cache": cache},
    )


def build_index_gather(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Read the index keys of whole contexts out of their pages, as a prefill does before its ragged logits."""
    batch, context, layout = params["batch"], params["context"], params["layout"]
    pages = -(-context // INDEX_PAGE_SIZE)
    cache = base.index_pool(max(batch * pages, params["pool_pages"]), device)
    lens = torch.full((batch,), context, dtype=torch.int32, device=device)
    touched = 2 * batch * context * base.INDEX_TOKEN_BYTES + batch * pages * 4
    sets = input_sets(touched, batch * pages * 4, device, at_least=params["min_sets"])

    def run(impl: str | None, table: torch.Tensor, poison: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return index_key_cache.gather(cache, table, lens, layout=layout, total_tokens=batch * context, impl=impl)

    def check(out: tuple[torch.Tensor, torch.Tensor], table: torch.Tensor) -> float:
        pairs = list(zip(out, run("torch", table, False), strict=True))
        if any(x.shape != y.shape for x, y in pairs):
            return float("inf")
        return max(float((x.view(torch.uint8) != y.view(torch.uint8)).float().mean()) for x, y in pairs)

    return Problem(
        inputs=[base.own_pages([pages] * batch, cache.shape[0], device) for _ in range(sets)],
        run=run,
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
    cos_sin = _cos_sin(64, device) if params["rope"] else None
    row = base.ROW_BYTES["bf16"]
    touched = tokens * (row + base.ROW_BYTES[kind] + 8 + (8 + 256 if params["rope"] else 0))
    sets = input_sets(touched, tokens * row, device, at_least=params["min_sets"])
    inputs = [
        (
            _bf16(tokens, base.VALUE_DIM, device=device),
            _bf16(tokens, 64, device=device),
            torch.randperm(cache.shape[0], device=device)[:tokens],
            torch.randint(MAX_POSITION, (tokens,), device=device),
        )
        for _ in range(sets)
    ]

    def store(impl: str | None, item: Any) -> None:
        nope, rope, slots, positions = item
        latent_cache.store(
            nope,
            rope,
            cache,
            slots,
            positions=positions if cos_sin is not None else None,
            cos_sin_cache=cos_sin,
            impl=impl,
        )

    def rows(item: Any) -> torch.Tensor:
        picked = cache[item[2], 0]
        return latent_reference.unpack(picked, base.VALUE_DIM) if kind == "packed" else picked.float()

    def run(impl: str | None, item: Any, poison: bool) -> torch.Tensor:
        store(impl, item)
        return cache

    def check(out: torch.Tensor, item: Any) -> float:
        stored = rows(item)
        store("torch", item)
        return base.cosine_distance(stored, rows(item))

    return Problem(
        inputs=inputs,
        run=run,
        check=check,
        bar=base.FP8_BAR if kind == "packed" else base.BF16_BAR,
        checked=f"all {tokens} rows, dequantized, against torch float32",
        bytes=touched,
        flops=0,
        extra={"cache": cache},
    )


def build_quantize(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Pack rows into a fresh tensor (seed 004's job)."""
    tokens = params["tokens"]

    def run(impl: str | None, item: torch.Tensor, poison: bool) -> torch.Tensor:
        return latent_cache.quantize(item, impl=impl)

    def check(out: torch.Tensor, item: torch.Tensor) -> float:
        actual, expected = out.view(torch.uint8).reshape(tokens, -1), run("torch", item, False)
        unpack = latent_reference.unpack
        return base.cosine_distance(unpack(actual, base.VALUE_DIM), unpack(expected, base.VALUE_DIM))

    return _rows_problem(params, device, run, check, base.FP8_BAR, packed=False)


def build_dequantize(params: Mapping[str, Any], device: torch.device) -> Problem:
    """Unpack rows into a fresh tensor."""

    def run(impl: str | None, item: torch.Tensor, poison: bool) -> torch.Tensor:
        return latent_cache.dequantize(item, impl=impl)

    def check(out: torch.Tensor, item: torch.Tensor) -> float:
        return base.cosine_distance(out.float(), run("torch", item, False).float())

    return _rows_problem(params, device, run, check, base.BF16_BAR, packed=True)


def _rows_problem(params: Mapping[str, Any], device: torch.device, run, check, bar: float, packed: bool) -> Problem:
    tokens = params["tokens"]
    touched = tokens * (base.ROW_BYTES["bf16"] + base.ROW_BYTES["packed"])
    sets = input_sets(touched, tokens * base.ROW_BYTES["bf16"], device, at_least=params["min_sets"])
    rows = [_bf16(tokens, base.HEAD_DIM, device=device) for _ in range(sets)]
    return Problem(
        inputs=[latent_reference.pack(r, base.VALUE_DIM) for r in rows] if packed else rows,
        run=run,
        check=check,
        bar=bar,
        checked=f"all {tokens} rows against torch float32",
        bytes=touched,
        flops=0,
    )


def build_norm_quant(params: Mapping[str, Any], device: torch.device) -> Problem:
    """RMS norm of q_lora, a slice of the projection's output, quantized for the next GEMM."""
    tokens, width = params["tokens"], params["width"]
    weight = (torch.rand(width, device=device) + 0.5).to(torch.bfloat16)
    touched = tokens * width * 3
    sets = input_sets(touched, tokens * width, device, at_least=params["min_sets"])

    def run(impl: str | None, item: torch.Tensor, poison: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return norm_quant.rms(item, weight, impl=impl)

    def dequantized(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return values.float() * scales.repeat_interleave(norm_quant.GROUP, 1)

    def check(out: tuple[torch.Tensor, torch.Tensor], item: torch.Tensor) -> float:
        return base.cosine_distance(dequantized(*out), dequantized(*run("torch", item, False)))

    return Problem(
        inputs=[_bf16(tokens, width + base.HEAD_DIM, device=device)[:, :width] for _ in range(sets)],
        run=run,
        check=check,
        bar=base.FP8_BAR,
        checked=f"all {tokens} rows, dequantized, against torch float32",
        bytes=touched,
        flops=0,
        extra={"weight": weight},
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
