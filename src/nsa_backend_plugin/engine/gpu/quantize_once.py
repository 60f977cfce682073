"""One activation quantization for several fp8 projections of the same input (q_b_proj and the indexer's wq_b)."""

from __future__ import annotations

from typing import Any

import torch

_GROUP = 128


def shared_input(x: torch.Tensor, *projections: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What every projection may be called with: (fp8 values, scales) where all of them would quantize x alike with
    SGLang's block-fp8 DeepGEMM path, which takes such a pair; else x itself."""
    if not all(_takes_pairs(p) for p in projections):
        return x
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8

    return sglang_per_token_group_quant_fp8(x, _GROUP, column_major_scales=True, scale_tma_aligned=True)


def _takes_pairs(projection: Any) -> bool:
    run = getattr(getattr(projection, "quant_method", None), "w8a8_block_fp8_linear", None)
    if getattr(run, "__name__", "") != "deepgemm_w8a8_block_fp8_linear_with_fallback":
        return False
    from sglang.srt.layers import deep_gemm_wrapper

    rows, columns = projection.weight.shape
    return not deep_gemm_wrapper.DEEPGEMM_SCALE_UE8M0 and rows % 64 == 0 and columns % _GROUP == 0
