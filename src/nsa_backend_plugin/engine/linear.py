"""Which of SGLang's linear layers may be merged, or read in place of being called: the one rule for all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from nsa_backend_plugin.runtime.merged_weights import MergedWeights, Rows


def obstacle(layer: Any, row_parallel: bool = False) -> str | None:
    """Why a layer must be called itself; None for a plain linear layer whose weight is bf16, or fp8 blocks.

    Plain is exactly SGLang's class (a LoRA wrapper is another) without a bias, its weight an ordinary tensor (torchao's
    is not). row_parallel: whether the class may be the one whose results are summed over ranks. fp8 blocks are e4m3fn
    values with one fp32 scale per block; scales packed for Blackwell are int32.
    """
    if type(layer) not in (ReplicatedLinear, ColumnParallelLinear, *((RowParallelLinear,) if row_parallel else ())):
        return f"it is a {type(layer).__name__}"
    if layer.bias is not None:
        return "it has a bias"
    weight, method = getattr(layer, "weight", None), type(layer.quant_method)
    if weight is not None and type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    bf16 = method is UnquantizedLinearMethod and weight is not None and weight.dtype == torch.bfloat16
    if bf16 or is_fp8_blocks(layer):
        return None
    kind = "packed" if weight is None else str(weight.dtype)
    return f"its weight is {kind}, of {method.__name__}"


def merged(layers: Sequence[Any], **matrices: Sequence[Rows]) -> MergedWeights:
    """The weights of layers as one for as long as none has an `obstacle`. matrices: see `MergedWeights`."""
    return MergedWeights(matrices, layers, lambda: next(filter(None, map(obstacle, layers)), None))


def is_fp8_blocks(layer: Any) -> bool:
    """Whether a layer of SGLang's fp8 method has e4m3fn values [N, K] and fp32 scales, one for each block of them."""
    weight, scale = getattr(layer, "weight", None), getattr(layer, "weight_scale_inv", None)
    if type(layer.quant_method) is not Fp8LinearMethod or weight is None or scale is None:
        return False
    block = layer.quant_method.weight_block_size
    return (
        weight.dtype == torch.float8_e4m3fn
        and scale.dtype == torch.float32
        and not getattr(scale, "format_ue8m0", False)
        and block is not None
        and tuple(scale.shape) == tuple(-(-size // each) for size, each in zip(weight.shape, block, strict=True))
    )


def rounds_token_scales(layer: Any) -> bool:
    """Whether a layer with fp8 blocks rounds the scales of its tokens up to powers of two, as some checkpoints ask."""
    run = getattr(layer.quant_method, "w8a8_block_fp8_linear", None)
    return isinstance(run, functools.partial) and bool(run.keywords.get("act_scale_ue8m0"))


def bf16_weight(layer: Any) -> torch.Tensor:
    """The weight [N, K] of a layer without `obstacle`: its own parameter, or fp8 blocks dequantized."""
    if not is_fp8_blocks(layer):
        return layer.weight
    block = layer.quant_method.weight_block_size
    return block_quant_dequant(layer.weight.data, layer.weight_scale_inv.data, block, torch.bfloat16)
