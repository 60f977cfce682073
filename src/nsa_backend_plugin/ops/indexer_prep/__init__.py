"""Preparation of the indexer's query and key: norm, RoPE, Hadamard rotation, fp8 quantization, fused.

Hadamard is orthonormal, so logits do not change, but q and the cached k must agree on it.
RoPE acts on the first `cos_sin_cache.shape[1]` of the 128 dimensions.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES, INDEX_DIM, INDEX_PAGE_SIZE, SCALE_FORMATS
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops._torch.rotary import check_rope
from nsa_backend_plugin.ops.arch import fp8_dtype as device_fp8_dtype
from nsa_backend_plugin.ops.index_key_cache import check_cache
from nsa_backend_plugin.ops.registry import Operation

_query = Operation("indexer_prep", "query")
_key_store = Operation("indexer_prep", "key_store")
NORMS = ("layer", "rms")


def query(
    q: torch.Tensor,
    head_gate: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    *,
    weight_scale: float,
    is_neox: bool,
    hadamard: bool = True,
    scale_format: str = "fp32",
    fp8_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE, Hadamard and quantize the indexer's query, and fold its scale into the head gates.

    q: [T, H, 128] bf16/fp16/fp32. head_gate: [T, H], any float dtype, rows strided freely. positions: [T].
    cos_sin_cache: [max_position, rope_dim] fp32, cosines then sines. weight_scale: softmax scale * H**-0.5.
    Returns (q_fp8 [T, H, 128], weights [T, H] fp32) with weights = head_gate * q_scale * weight_scale.
    Raises ValueError for bad shapes, dtypes, devices or names. Source: DeepSeek-V3.2 indexer.
    """
    checks.tensor("q", q, (None, None, INDEX_DIM), checks.FLOAT_DTYPES)
    checks.inner_contiguous("q", q)
    checks.tensor("head_gate", head_gate, q.shape[:2], checks.FLOAT_DTYPES, q.device)
    checks.inner_contiguous("head_gate", head_gate)
    check_rope(positions, cos_sin_cache, q.shape[0], q.device)
    checks.require(cos_sin_cache.shape[1] <= INDEX_DIM, "cos_sin_cache.shape[1]", cos_sin_cache.shape[1], "at most 128")
    checks.choice("scale_format", scale_format, SCALE_FORMATS)
    dtype = fp8_dtype or device_fp8_dtype(q.device)
    checks.choice("fp8_dtype", dtype, FP8_DTYPES)
    q_fp8 = torch.empty(q.shape, dtype=dtype, device=q.device)
    weights = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    _query(
        impl,
        q.device,
        {"tokens": q.shape[0], "heads": q.shape[1]},
        q,
        head_gate,
        positions,
        cos_sin_cache,
        weight_scale=weight_scale,
        is_neox=is_neox,
        hadamard=hadamard,
        scale_format=scale_format,
        q_fp8=q_fp8,
        weights=weights,
    )
    return q_fp8, weights


def key_store(
    key: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    is_neox: bool,
    norm: str = "layer",
    eps: float = 1e-6,
    hadamard: bool = True,
    layout: str = "row_major",
    scale_format: str = "fp32",
    page_size: int = INDEX_PAGE_SIZE,
    fp8_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> None:
    """Norm, RoPE, Hadamard and quantize the indexer's key and store it into its page.

    key: [T, 128] bf16/fp16/fp32, rows strided freely. norm_weight, norm_bias: [128] (bias None for "rms").
    cache, slots, layout, scale_format, page_size, fp8_dtype: as `index_key_cache.store`.
    Raises ValueError for bad shapes, dtypes, devices, names or slots. Source: DeepSeek-V3.2 indexer.
    """
    check_cache(cache, layout, page_size)
    checks.tensor("key", key, (None, INDEX_DIM), checks.FLOAT_DTYPES, cache.device)
    checks.inner_contiguous("key", key)
    checks.choice("norm", norm, NORMS)
    checks.tensor("norm_weight", norm_weight, (INDEX_DIM,), checks.FLOAT_DTYPES, cache.device)
    checks.require(
        (norm_bias is not None) == (norm == "layer"),
        "norm_bias",
        norm_bias,
        "a tensor with norm='layer' only",
    )
    if norm_bias is not None:
        checks.tensor("norm_bias", norm_bias, (INDEX_DIM,), checks.FLOAT_DTYPES, cache.device)
    check_rope(positions, cos_sin_cache, key.shape[0], cache.device)
    checks.require(cos_sin_cache.shape[1] <= INDEX_DIM, "cos_sin_cache.shape[1]", cos_sin_cache.shape[1], "at most 128")
    checks.tensor("slots", slots, (key.shape[0],), checks.INT_DTYPES, cache.device)
    checks.index_range("slots", slots, -(2**62), cache.shape[0] * page_size)
    checks.choice("scale_format", scale_format, SCALE_FORMATS)
    dtype = fp8_dtype or device_fp8_dtype(cache.device)
    checks.choice("fp8_dtype", dtype, FP8_DTYPES)
    _key_store(
        impl,
        cache.device,
        {"tokens": key.shape[0], "layout": layout},
        key,
        norm_weight,
        norm_bias,
        positions,
        cos_sin_cache,
        cache,
        slots,
        is_neox=is_neox,
        norm=norm,
        eps=eps,
        hadamard=hadamard,
        layout=layout,
        scale_format=scale_format,
        page_size=page_size,
        fp8_dtype=dtype,
    )
