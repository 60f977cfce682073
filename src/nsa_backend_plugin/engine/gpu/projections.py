"""A layer's projections of few tokens by `ops.projection`, and by SGLang's own GEMMs of more.

fused_qkv_a_proj_with_mqa, q_b_proj, o_proj, wk_weights_proj   called by SGLang: `install` puts ours before the
                                                               `apply` of the layer's own method
q_b_proj | wq_b, wk | weights_proj, merged; W_UK               called by the fused decode path
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from nsa_backend_plugin.engine import hooks, linear
from nsa_backend_plugin.ops import projection
from nsa_backend_plugin.ops.arch import device_arch

#: Most tokens that a projection takes by ours: SGLang's GEMMs, which read their tokens once for more rows, are faster
#: with more. benchmarks/configs/projection.yaml, H200, 2026-11-27, before ours quantized its tokens.
MOST_TOKENS = {
    "fused_qkv_a_proj_with_mqa": 16,
    "q_b_proj": 16,
    "wk_weights_proj": 32,
    "w_uk": 32,
    "o_proj": 16,
}
#: There too: of longer rows (o_proj of 128 heads has 16384), and of more heads, the others are faster with any number.
_MOST_DEPTH, _MOST_HEADS = 8192, 64


def measured(device: torch.device) -> bool:
    """Whether ours was measured beside the GEMMs of a device."""
    return device_arch(device) == "sm_90"


def readable(weight: torch.Tensor, scale: torch.Tensor | None = None) -> bool:
    """Whether `ops.projection` reads weights [N, K] or [heads, N, K], and is faster with few tokens."""
    multiple = projection.DEPTH_OF.get(weight.dtype)
    return (
        multiple is not None
        and 0 < weight.shape[-1] <= _MOST_DEPTH
        and weight.shape[-1] % multiple == 0
        and all(part is None or part.is_contiguous() for part in (weight, scale))
    )


def takes(name: str, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None) -> bool:
    """Whether ours multiplies tokens [T, K] with the weights of a projection."""
    return (
        x.shape[0] <= MOST_TOKENS[name]
        and x.dtype == torch.bfloat16
        and x.stride(-1) == 1
        and measured(x.device)
        and readable(weight, scale)
    )


def takes_heads(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ours multiplies queries [T, heads, K] with W_UK [heads, K, N]."""
    return x.shape[0] <= most_tokens_absorbed(weight, x.dtype)


def most_tokens_absorbed(weight: torch.Tensor | None, dtype: torch.dtype) -> int:
    """The most tokens whose queries ours multiplies with W_UK [heads, K, N]; 0 if none."""
    if weight is None:  # SGLang has not absorbed it
        return 0
    fits = weight.dtype == dtype == torch.bfloat16 and len(weight) <= _MOST_HEADS and readable(weight.transpose(1, 2))
    return MOST_TOKENS["w_uk"] if fits and measured(weight.device) else 0


def install(attn: Any) -> None:
    """Put ours before the `apply` of the layers that SGLang calls, where it was measured and can read a layer."""
    for name, layer in called_by_sglang(attn).items():
        method = layer.quant_method
        if measured(layer.weight.device) and getattr(method.apply, "func", None) is not _apply:
            method.apply = functools.partial(_apply, name, method.apply)
            hooks.fired("few_tokens")


def called_by_sglang(attn: Any) -> dict[str, Any]:
    """The layers that SGLang calls and ours can read, by their names in MOST_TOKENS."""
    found = {name: getattr(attn, name, None) for name in ("fused_qkv_a_proj_with_mqa", "q_b_proj", "o_proj")}
    found["wk_weights_proj"] = getattr(getattr(attn, "indexer", None), "wk_weights_proj", None)
    return {name: layer for name, layer in found.items() if layer is not None and obstacle(layer) is None}


def obstacle(layer: Any) -> str | None:
    """Why a layer's own product stays; None if ours can take it."""
    if reason := linear.obstacle(layer, row_parallel=True):
        return reason
    if linear.is_fp8_blocks(layer) and list(layer.quant_method.weight_block_size) != [projection.GROUP] * 2:
        return f"its blocks are {layer.quant_method.weight_block_size}"
    if linear.rounds_token_scales(layer):
        return "it rounds the scales of its tokens"
    if not readable(layer.weight, getattr(layer, "weight_scale_inv", None)):
        return f"its weight is {layer.weight.dtype} {list(layer.weight.shape)}"
    return None


def _apply(
    name: str, original: Callable[..., torch.Tensor], layer: Any, x: Any, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As a linear method's `apply`. Its caller reduces over tensor-parallel ranks."""
    scale = getattr(layer, "weight_scale_inv", None)
    if isinstance(x, torch.Tensor) and x.dim() == 2 and bias is None and takes(name, x, layer.weight, scale):
        return projection.linear(x, layer.weight, scale)
    return original(layer, x, bias)
