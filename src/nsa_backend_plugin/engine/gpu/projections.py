"""A layer's projections of few tokens by `ops.projection`, and by SGLang's own GEMMs of more.

fused_qkv_a_proj_with_mqa, q_b_proj, o_proj, wk_weights_proj   called by SGLang: `install` puts ours before the
                                                               `apply` of the layer's own method
W_UV                                                           `install` puts ours before `forward_absorb_core`
q_b_proj | wq_b, wk | weights_proj, merged; W_UK               called by the fused decode path
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

# The names that the replaced method uses, from its own module: their homes move between releases.
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla import (
    DeepseekMLAForwardMixin,
    get_parallel,
    is_kv_b_lora_active,
)

from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.engine import hooks, linear
from nsa_backend_plugin.ops import projection
from nsa_backend_plugin.ops.arch import device_arch

#: Most tokens that ours multiplies: SGLang's GEMMs, which read their tokens once for more rows, are faster with more.
#: Whole layers of V3.2, H200, 2026-11-28 (RESULTS.notes.md).
MOST_TOKENS = 32
#: Most tokens of which the projection q_a | kv_a leaves room for others beside it. There, too.
_SHARES = 16
#: Of longer rows (o_proj of 128 heads has 16384), and of more heads, the others are faster with any number of tokens:
#: benchmarks/configs/projection.yaml, there too.
_MOST_DEPTH, _MOST_HEADS = 8192, 64


def measured(device: torch.device) -> bool:
    """Whether ours was measured beside the GEMMs of a device."""
    return device_arch(device) == "sm_90"


def shares_the_gpu(positions: torch.Tensor) -> bool:
    """Whether the projection q_a | kv_a of a batch with these positions [T] leaves room for others beside it."""
    return positions.shape[0] <= _SHARES and measured(positions.device)


def readable(weight: torch.Tensor, scale: torch.Tensor | None = None) -> bool:
    """Whether `ops.projection` reads weights [N, K] or [heads, N, K], and is faster with few tokens."""
    multiple = projection.DEPTH_OF.get(weight.dtype)
    return (
        multiple is not None
        and 0 < weight.shape[-1] <= _MOST_DEPTH
        and weight.shape[-1] % multiple == 0
        and all(part is None or part.is_contiguous() for part in (weight, scale))
    )


def takes(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None) -> bool:
    """Whether ours multiplies tokens [T, K] with the weights of a projection."""
    return (
        x.shape[0] <= MOST_TOKENS
        and x.dtype == torch.bfloat16
        and x.stride(-1) == 1
        and measured(x.device)
        and readable(weight, scale)
    )


def takes_heads(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ours multiplies tokens [T, heads, K] with W_UK or W_UV [heads, K, N]."""
    return x.shape[0] <= MOST_TOKENS and most_tokens_of_heads(weight, x.dtype) > 0


def most_tokens_of_heads(weight: torch.Tensor | None, dtype: torch.dtype) -> int:
    """The most tokens that ours multiplies with W_UK or W_UV [heads, K, N]; 0 if none."""
    if weight is None:  # SGLang has not absorbed it
        return 0
    fits = weight.dtype == dtype == torch.bfloat16 and len(weight) <= _MOST_HEADS and readable(weight.transpose(1, 2))
    return MOST_TOKENS if fits and measured(weight.device) else 0


def install(attn: Any) -> None:
    """Put ours before what SGLang calls, where it was measured and can read a layer."""
    if _absorbs_values(attn) and getattr(attn.forward_absorb_core, "func", None) is not _absorb_core:
        attn.forward_absorb_core = functools.partial(_absorb_core, attn.forward_absorb_core, attn)
        hooks.fired("few_tokens")
    for layer in called_by_sglang(attn).values():
        method = layer.quant_method
        if measured(layer.weight.device) and getattr(method.apply, "func", None) is not _apply:
            method.apply = functools.partial(_apply, method.apply)
            hooks.fired("few_tokens")


def most_tokens_of_values(model: torch.nn.Module) -> int:
    """The most tokens that ours multiplies with W_UV in the first layer that has it; 0 if none."""
    attn: Any = next((module for module in model.modules() if hasattr(module, "w_vc")), None)
    return most_tokens_of_heads(attn.w_vc, torch.bfloat16) if attn is not None and _absorbs_values(attn) else 0


def _absorbs_values(attn: Any) -> bool:
    """Whether the layer multiplies with W_UV as SGLang's own class does, and ours can read that."""
    own = getattr(type(attn), "forward_absorb_core", None) is DeepseekMLAForwardMixin.forward_absorb_core
    return own and bool(most_tokens_of_heads(attn.w_vc, torch.bfloat16))


def called_by_sglang(attn: Any) -> dict[str, Any]:
    """The layers that SGLang calls and ours can read, by name."""
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


def _apply(original: Callable[..., torch.Tensor], layer: Any, x: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As a linear method's `apply`. Its caller reduces over tensor-parallel ranks."""
    scale = getattr(layer, "weight_scale_inv", None)
    if isinstance(x, torch.Tensor) and x.dim() == 2 and bias is None and takes(x, layer.weight, scale):
        return projection.linear(x, layer.weight, scale)
    return original(layer, x, bias)


def _absorb_core(
    original: Callable[..., Any],
    attn: Any,
    q_rope: torch.Tensor,
    k_rope: torch.Tensor | None,
    q_nope: torch.Tensor,
    k_nope: torch.Tensor | None,
    forward_batch: Any,
    zero_allocator: Any,
    positions: torch.Tensor,
    topk_indices: torch.Tensor | None,
    *rest: Any,
) -> Any:
    """As `forward_absorb_core` of the model: attention, W_UV and o_proj. rest: None in what ours takes."""
    if _core_obstacle(attn, q_nope, rest):
        return original(
            *(q_rope, k_rope, q_nope, k_nope, forward_batch, zero_allocator, positions, topk_indices), *rest
        )
    slots = {} if topk_indices is None else {"topk_indices": topk_indices}
    values = attn.attn_mqa(q_nope, k_nope, k_nope, forward_batch, q_rope=q_rope, k_rope=k_rope, **slots)
    heads = values.view(-1, attn.num_local_heads, attn.kv_lora_rank)
    output, _ = attn.o_proj(projection.per_head(heads, attn.w_vc.transpose(1, 2)).flatten(1))
    if attn.next_skip_topk is None:
        return output
    return output, topk_indices if attn.next_skip_topk else None


def _core_obstacle(attn: Any, q_nope: torch.Tensor, rest: tuple[Any, ...]) -> bool:
    return (
        attn.current_attention_backend != BACKEND_NAME
        or not takes_heads(q_nope, attn.w_vc)  # attention's result has its shape
        or any(value is not None for value in rest)
        or getattr(attn, "learnable_sink_param", None) is not None
        or get_parallel().dcp_enabled
        or is_kv_b_lora_active(attn)
    )
