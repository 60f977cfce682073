"""q_b_proj and the indexer's wq_b as one GEMM over one input: q_lora, normalized and for fp8 weights quantized."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from nsa_backend_plugin.engine import indexer as indexer_path
from nsa_backend_plugin.engine import linear
from nsa_backend_plugin.engine.gpu import projections, rocm
from nsa_backend_plugin.ops import norm_quant, projection
from nsa_backend_plugin.runtime.merged_weights import MergedWeights

_MERGED = "nsa_plugin_q_b_wq_b"
_BLOCK = [norm_quant.GROUP] * 2
_DEEP_GEMM = "deepgemm_w8a8_block_fp8_linear_with_fallback"


def obstacle(attn: Any) -> str | None:
    """Why q_b_proj and wq_b must be called apart; None if one GEMM can take both.

    Both are bf16, or SGLang runs both as fp8 blocks by DeepGEMM, on fp32 scales and for bf16 results.
    """
    if rocm.on_rocm():
        return "on ROCm weights may be shuffled for AITER's GEMM"
    layers = {"q_b_proj": attn.q_b_proj, "indexer.wq_b": attn.indexer.wq_b}
    for name, layer in layers.items():
        if reason := linear.obstacle(layer):
            return f"{name} serves itself: {reason}"
    if not any(map(linear.is_fp8_blocks, layers.values())):
        return None
    for name, layer in layers.items():
        if reason := _fp8_obstacle(layer):
            return f"q_b_proj and indexer.wq_b need one kind of GEMM: {name} {reason}"
    return None


def _fp8_obstacle(layer: Any) -> str | None:
    from sglang.srt.layers import deep_gemm_wrapper

    if not linear.is_fp8_blocks(layer):
        return f"is {layer.weight.dtype}"
    if deep_gemm_wrapper.DEEPGEMM_SCALE_UE8M0:
        return "takes packed scales"
    run = layer.quant_method.w8a8_block_fp8_linear
    run = run.func if isinstance(run, functools.partial) else run
    if getattr(run, "__name__", "") != _DEEP_GEMM:
        return f"runs by {getattr(run, '__name__', run)}"
    if layer.orig_dtype != torch.bfloat16:
        return f"returns {layer.orig_dtype}"
    block, (rows, columns) = layer.quant_method.weight_block_size, layer.weight.shape
    if list(block) != _BLOCK or rows % norm_quant.GROUP or columns % norm_quant.GROUP:
        return f"has {rows} rows of {columns} in blocks of {block}"
    return None


def merge(attn: Any) -> None:
    """Give the layer q_b_proj's weights with wq_b's behind them, where they allow it; both become views of the two."""
    if hasattr(attn, _MERGED) or obstacle(attn):
        return
    layers = q_b, wq_b = attn.q_b_proj, attn.indexer.wq_b
    matrices = {"weight": [lambda: q_b.weight, lambda: wq_b.weight]}
    if linear.is_fp8_blocks(q_b):
        matrices["scale"] = [lambda: q_b.weight_scale_inv, lambda: wq_b.weight_scale_inv]
    setattr(attn, _MERGED, linear.merged(layers, **matrices))


def merged(attn: Any) -> MergedWeights | None:
    """The two as one; None where they are not merged, or where one was wrapped or replaced since."""
    found = getattr(attn, _MERGED, None)
    return found if found is not None and found.serves(attn.q_b_proj, attn.indexer.wq_b) else None


def quantizes(attn: Any) -> bool:
    """Whether the merged projection takes q_lora as fp8: then its norm is `norm_quant.rms`."""
    return hasattr(merged(attn), "scale")


def project(attn: Any, q_lora: torch.Tensor) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """(index query [T, index heads, 128], what gives q [T, heads, nope + rope]) of q_lora before its norm.

    Both come from one GEMM, now, if the layers are merged; else q's GEMM runs when it is asked for.
    """
    indexer, both = attn.indexer, merged(attn)
    if both is None:
        normalized = attn.q_a_layernorm(q_lora)
        return indexer_path.project_query(indexer, normalized), lambda: attn.q_b_proj_forward(normalized)
    rows = attn.num_local_heads * attn.qk_head_dim
    q, index_query = _multiply(attn, both, q_lora).tensor_split([rows], dim=1)
    return (
        index_query.view(-1, indexer.n_heads, indexer.head_dim),
        lambda: q.view(-1, attn.num_local_heads, attn.qk_head_dim),
    )


def _multiply(attn: Any, both: MergedWeights, q_lora: torch.Tensor) -> torch.Tensor:
    """[T, rows of both] of q_lora before its norm."""
    norm, scale = attn.q_a_layernorm, getattr(both, "scale", None)
    plain = norm.weight.dtype == torch.bfloat16 and not linear.rounds_token_scales(attn.q_b_proj)
    if plain and projections.takes(q_lora, both.weight, scale):
        return projection.linear(q_lora, both.weight, scale, norm_weight=norm.weight, eps=norm.variance_epsilon)
    if scale is None:
        return norm(q_lora) @ both.weight.t()
    run = attn.q_b_proj.quant_method.w8a8_block_fp8_linear
    values, scales = norm_quant.rms(
        q_lora,
        norm.weight,
        eps=norm.variance_epsilon,
        scale_format="ue8m0" if linear.rounds_token_scales(attn.q_b_proj) else "fp32",
    )
    return run(input=values, weight=both.weight, block_size=_BLOCK, weight_scale=scale, input_scale=scales)
