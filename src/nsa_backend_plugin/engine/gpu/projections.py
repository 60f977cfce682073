"""A layer's projections of few tokens by `ops.projection`, and by SGLang's own GEMMs of more.

    fused_qkv_a_proj_with_mqa, q_b_proj, o_proj, wk_weights_proj   called by SGLang: `install` puts ours before the
                                                                   `apply` of the layer's own method
    q_b_proj | wq_b, wk | weights_proj, merged; W_UK               called by the fused decode path

Ours does not quantize tokens, so its results are closer to the checkpoint's than a block-fp8 GEMM's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from nsa_backend_plugin.engine import linear
from nsa_backend_plugin.ops import projection
from nsa_backend_plugin.ops.arch import device_arch

#: Most tokens that a projection takes by ours: SGLang's GEMMs, which read their tokens once for more rows, are faster
#: with more. `projection` in benchmarks/RESULTS.md has both.
MOST_TOKENS = {
    "fused_qkv_a_proj_with_mqa": 32,
    "q_b_proj": 16,
    "wk_weights_proj": 32,
    "w_uk": 32,
    "o_proj": 32,
}
#: W_UK of more heads is large enough for cuBLAS.
_MOST_HEADS = 64


def measured(device: torch.device) -> bool:
    """Whether ours was measured beside the GEMMs of a device."""
    return device_arch(device) == "sm_90"


def takes(name: str, x: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    """Whether ours multiplies tokens [T, ...] with the weights of a projection."""
    return (
        x.shape[0] <= MOST_TOKENS[name]
        and x.dtype == torch.bfloat16
        and measured(x.device)
        and all(weight is None or weight.is_contiguous() for weight in weights)
    )


def takes_heads(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ours multiplies queries [T, heads, K] with W_UK [heads, K, N]."""
    return x.shape[0] <= most_tokens_absorbed(weight, x.dtype)


def most_tokens_absorbed(weight: torch.Tensor, dtype: torch.dtype) -> int:
    """The most tokens whose queries ours multiplies with W_UK [heads, K, N]; 0 if none."""
    readable = weight.dtype == dtype == torch.bfloat16 and weight.transpose(1, 2).is_contiguous()
    return MOST_TOKENS["w_uk"] if readable and len(weight) <= _MOST_HEADS and measured(weight.device) else 0


def install(attn: Any) -> None:
    """Put ours before the `apply` of the layers that SGLang calls, where a layer is one that ours can read."""
    for name, layer in called_by_sglang(attn).items():
        method = layer.quant_method
        if getattr(method.apply, "func", None) is not _apply:
            method.apply = functools.partial(_apply, name, method.apply)


def called_by_sglang(attn: Any) -> dict[str, Any]:
    """The layers that SGLang calls and ours can read, by their names in MOST_TOKENS."""
    found = {name: getattr(attn, name, None) for name in ("fused_qkv_a_proj_with_mqa", "q_b_proj", "o_proj")}
    found["wk_weights_proj"] = getattr(getattr(attn, "indexer", None), "wk_weights_proj", None)
    return {name: layer for name, layer in found.items() if layer is not None and obstacle(layer) is None}


def obstacle(layer: Any) -> str | None:
    """Why a layer's own product stays; None if ours can read its weights."""
    if reason := linear.obstacle(layer, row_parallel=True):
        return reason
    if linear.is_fp8_blocks(layer) and list(layer.quant_method.weight_block_size) != [projection.GROUP] * 2:
        return f"its blocks are {layer.quant_method.weight_block_size}"
    return None


def _apply(
    name: str, original: Callable[..., torch.Tensor], layer: Any, x: Any, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As a linear method's `apply`. Its caller reduces over tensor-parallel ranks."""
    scale = getattr(layer, "weight_scale_inv", None)
    if isinstance(x, torch.Tensor) and x.dim() == 2 and bias is None and takes(name, x, layer.weight, scale):
        return projection.linear(x, layer.weight, scale)
    return original(layer, x, bias)
