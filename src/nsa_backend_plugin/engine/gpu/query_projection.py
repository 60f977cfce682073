"""q_b_proj and the indexer's wq_b as one GEMM over one input: q_lora, normalized and for fp8 weights quantized."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nsa_backend_plugin.engine.gpu import indexer as indexer_path
from nsa_backend_plugin.engine.gpu import merged_weights
from nsa_backend_plugin.ops import norm_quant

_MERGED = "_nsa_plugin_q_b_wq_b"
_BLOCK = [norm_quant.GROUP] * 2
_DEEP_GEMM = "deepgemm_w8a8_block_fp8_linear_with_fallback"


@dataclass(frozen=True)
class Merged:
    """weight: q_b_proj's rows, then wq_b's. scale: fp32, one per 128 x 128 block of an fp8 weight, else None."""

    wq_b: Any
    weight: torch.Tensor
    scale: torch.Tensor | None
    fp8_linear: Callable[..., torch.Tensor] | None

    def __call__(self, q_lora: torch.Tensor, norm: Any) -> torch.Tensor:
        """[T, rows of both] of q_lora before its norm."""
        if self.fp8_linear is None:
            return norm(q_lora) @ self.weight.t()
        values, scales = norm_quant.rms(
            q_lora, norm.weight, eps=norm.variance_epsilon, scale_format=_activation_scale(self.fp8_linear)
        )
        return self.fp8_linear(
            input=values, weight=self.weight, block_size=_BLOCK, weight_scale=self.scale, input_scale=scales
        )


def merge(attn: Any) -> None:
    """Lay wq_b's weights behind q_b_proj's, where both are bf16 or SGLang runs both by its block-fp8 DeepGEMM path.

    The layers' own weights become views of the merged ones, so that weights which are updated while serving land there.
    """
    projections = attn.q_b_proj, attn.indexer.wq_b
    if hasattr(attn.q_b_proj, _MERGED) or any(getattr(p, "bias", None) is not None for p in projections):
        return
    scale, fp8_linear = None, None
    if all(_is_block_fp8(p) for p in projections):
        fp8_linear = attn.q_b_proj.quant_method.w8a8_block_fp8_linear
        scale = merged_weights.joined([p.weight_scale_inv for p in projections])
    elif not all(_is_bf16(p) for p in projections):
        return
    weight = merged_weights.joined([p.weight for p in projections])
    setattr(attn.q_b_proj, _MERGED, Merged(attn.indexer.wq_b, weight, scale, fp8_linear))


def _is_bf16(projection: Any) -> bool:
    """A plain one: a LoRA wrapper, which must be called itself, has no quant_method; torchao has tensors of its own."""
    method = type(getattr(projection, "quant_method", None)).__name__
    return (
        method == "UnquantizedLinearMethod"
        and type(projection.weight.data) is torch.Tensor
        and projection.weight.dtype == torch.bfloat16
    )


def _is_block_fp8(projection: Any) -> bool:
    """One that takes (fp8 values, fp32 scales), as SGLang's DeepGEMM path does where scales are not packed."""
    run = getattr(getattr(projection, "quant_method", None), "w8a8_block_fp8_linear", None)
    if isinstance(run, functools.partial):
        run = run.func
    if getattr(run, "__name__", "") != _DEEP_GEMM or projection.orig_dtype != torch.bfloat16:
        return False
    from sglang.srt.layers import deep_gemm_wrapper

    rows, columns = projection.weight.shape
    scale = projection.weight_scale_inv
    blocks = (scale.shape[0] * norm_quant.GROUP, scale.shape[1] * norm_quant.GROUP)
    return not deep_gemm_wrapper.DEEPGEMM_SCALE_UE8M0 and scale.dtype == torch.float32 and blocks == (rows, columns)


def _activation_scale(fp8_linear: Callable[..., torch.Tensor]) -> str:
    """Later releases bind the rounding of activation scales that a checkpoint asks for."""
    bound = fp8_linear.keywords if isinstance(fp8_linear, functools.partial) else {}
    return "ue8m0" if bound.get("act_scale_ue8m0") else "fp32"


def merged(attn: Any) -> Merged | None:
    """The two as one; None where they are not merged, or where one was replaced since."""
    found = getattr(attn.q_b_proj, _MERGED, None)
    return found if found is not None and found.wq_b is attn.indexer.wq_b else None


def project(attn: Any, q_lora: torch.Tensor) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """(index query [T, index heads, 128], what gives q [T, heads, nope + rope]) of q_lora before its norm.

    Both come from one GEMM, now, if the layers are merged; else q's GEMM runs when it is asked for.
    """
    indexer, both = attn.indexer, merged(attn)
    if both is None:
        normalized = attn.q_a_layernorm(q_lora)
        return indexer_path.project_query(indexer, normalized), lambda: attn.q_b_proj_forward(normalized)
    rows = attn.num_local_heads * attn.qk_head_dim
    q, index_query = both(q_lora, attn.q_a_layernorm).tensor_split([rows], dim=1)
    return (
        index_query.view(-1, indexer.n_heads, indexer.head_dim),
        lambda: q.view(-1, attn.num_local_heads, attn.qk_head_dim),
    )
