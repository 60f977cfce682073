"""q_b_proj and the indexer's wq_b as one GEMM over one input: q_lora, normalized and for fp8 weights quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from nsa_backend_plugin.ops import norm_quant

_MERGED = "_nsa_plugin_q_b_wq_b"


@dataclass(frozen=True)
class _Merged:
    """weight: q_b_proj's rows, then wq_b's. scale: fp32, one per 128 x 128 block of an fp8 weight, else None."""

    wq_b: Any
    weight: torch.Tensor
    scale: torch.Tensor | None
    fp8_linear: Callable[..., torch.Tensor] | None

    def __call__(self, q_lora: torch.Tensor, norm: Any) -> torch.Tensor:
        if self.fp8_linear is None:
            return norm(q_lora) @ self.weight.t()
        values, scales = norm_quant.rms(q_lora, norm.weight, eps=norm.variance_epsilon)
        return self.fp8_linear(
            input=values,
            weight=self.weight,
            block_size=[norm_quant.GROUP] * 2,
            weight_scale=self.scale,
            input_scale=scales,
        )


def merge(attn: Any) -> None:
    """Lay wq_b's weights behind q_b_proj's, where both are bf16 or SGLang runs both by its block-fp8 DeepGEMM path.

    The layers' own weights become views of the merged ones, so that weights which are updated while serving land there.
    """
    projections = attn.q_b_proj, attn.indexer.wq_b
    if hasattr(attn.q_b_proj, _MERGED) or any(getattr(p, "bias", None) is not None for p in projections):
        return
    if all(p.weight.dtype == torch.bfloat16 for p in projections):
        scale, fp8_linear = None, None
    elif all(_is_block_fp8(p) for p in projections):
        scale = _joined(p.weight_scale_inv for p in projections)
        fp8_linear = attn.q_b_proj.quant_method.w8a8_block_fp8_linear
    else:
        return
    weight = _joined(p.weight for p in projections)
    setattr(attn.q_b_proj, _MERGED, _Merged(attn.indexer.wq_b, weight, scale, fp8_linear))


def _joined(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """[rows of all, columns]; every part becomes a view of it."""
    parts = list(parts)
    sizes = [part.shape[0] for part in parts]
    joined = torch.empty(sum(sizes), parts[0].shape[1], dtype=parts[0].dtype, device=parts[0].device)
    for part, view in zip(parts, joined.split(sizes), strict=True):
        part.data = view.copy_(part)
    return joined


def _is_block_fp8(projection: Any) -> bool:
    run = getattr(getattr(projection, "quant_method", None), "w8a8_block_fp8_linear", None)
    if getattr(run, "__name__", "") != "deepgemm_w8a8_block_fp8_linear_with_fallback":
        return False
    rows, columns = projection.weight.shape
    scale = projection.weight_scale_inv  # packed as int32 on Blackwell
    return scale.dtype == torch.float32 and (rows, columns) == (
        scale.shape[0] * norm_quant.GROUP,
        scale.shape[1] * norm_quant.GROUP,
    )


def project(attn: Any, q_lora: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(q [T, heads, nope + rope], index query [T, index heads, 128]) of q_lora before its norm.

    None where the layers are not merged, or one was wrapped since, as LoRA does.
    """
    indexer = attn.indexer
    merged = getattr(attn.q_b_proj, _MERGED, None)
    if merged is None or merged.wq_b is not indexer.wq_b:
        return None
    both = merged(q_lora, attn.q_a_layernorm)
    rows = attn.num_local_heads * attn.qk_head_dim
    return (
        both[:, :rows].view(-1, attn.num_local_heads, attn.qk_head_dim),
        both[:, rows:].view(-1, indexer.n_heads, indexer.head_dim),
    )
