"""The two projections of q_lora, q_b_proj and the indexer's wq_b, as one GEMM over one quantization of its input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

_MERGED = "_nsa_plugin_q_b_wq_b"
_BLOCK = 128


@dataclass(frozen=True)
class _Merged:
    """weight: q_b_proj's rows, then wq_b's. scale: fp32, one per 128 x 128 block of an fp8 weight, else None."""

    wq_b: Any
    weight: torch.Tensor
    scale: torch.Tensor | None
    fp8_linear: Callable[..., torch.Tensor] | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.fp8_linear is None:
            return x @ self.weight.t()
        return self.fp8_linear(input=x, weight=self.weight, block_size=[_BLOCK, _BLOCK], weight_scale=self.scale)


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
    return scale.dtype == torch.float32 and (rows, columns) == (scale.shape[0] * _BLOCK, scale.shape[1] * _BLOCK)


def project(attn: Any, q_lora: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(q [T, heads, nope + rope], or None where the layers are not merged; index query [T, index heads, 128])."""
    indexer = attn.indexer
    merged = getattr(attn.q_b_proj, _MERGED, None)  # a LoRA wrapper of q_b_proj has none
    if merged is None or merged.wq_b is not indexer.wq_b:
        return None, indexer.wq_b(q_lora)[0].view(-1, indexer.n_heads, indexer.head_dim)
    both = merged(q_lora)
    rows = attn.num_local_heads * attn.qk_head_dim
    return (
        both[:, :rows].view(-1, attn.num_local_heads, attn.qk_head_dim),
        both[:, rows:].view(-1, indexer.n_heads, indexer.head_dim),
    )
