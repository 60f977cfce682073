"""Products of few tokens with the weights of a layer, which take the time of reading the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.call import Call, Fact, Step
from nsa_backend_plugin.ops.dispatch import operation

GROUP = 128  # rows, and values of each, that share a scale
_OUT_DTYPES = (torch.bfloat16, torch.float32)
#: What the depth is a multiple of, by the weights' dtype: 128 bytes.
DEPTH_OF = {torch.float8_e4m3fn: GROUP, torch.bfloat16: GROUP // 2}


@dataclass(slots=True, eq=False, kw_only=True)
class Linear(Call[torch.Tensor]):
    """The arguments of `linear`."""

    x: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    norm_weight: torch.Tensor | None
    eps: float
    out: torch.Tensor

    def facts(self) -> Mapping[str, Fact]:
        rows, depth = self.weight.shape
        return {
            "tokens": self.x.shape[0],
            "rows": rows,
            "depth": depth,
            "dtype": str(self.weight.dtype),
            "norm": self.norm_weight is not None,
        }


@dataclass(slots=True, eq=False, kw_only=True)
class PerHead(Call[torch.Tensor]):
    """The arguments of `per_head`."""

    x: torch.Tensor
    weight: torch.Tensor
    out: torch.Tensor

    def facts(self) -> Mapping[str, Fact]:
        heads, rows, depth = self.weight.shape
        return {"tokens": self.x.shape[0], "heads": heads, "rows": rows, "depth": depth}


@operation
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    step: Step | None = None,
    impl: str | None = None,
) -> Linear:
    """[T, N] `dtype` (bf16 or fp32) = x @ weight.T, of x [T, K] bf16, its rows strided freely.

    weight: [N, K] contiguous, bf16 with K a multiple of 64; or e4m3fn with K a multiple of 128 and weight_scale
    [ceil(N / 128), K / 128] fp32 contiguous, one for each block of 128 x 128 values. x is then quantized to e4m3 too,
    128 values to a scale of max(amax, 1e-4) / 448; products and sums are float32.
    norm_weight: [K] bf16, contiguous; x is first RMS normalized with `eps`.
    out: [T, N] `dtype`, its rows strided freely.
    Raises ValueError for bad shapes, dtypes, strides or devices. Source: the block-wise fp8 of DeepSeek-V3 (DeepGEMM).
    """
    checks.tensor("x", x, (None, None), torch.bfloat16)
    checks.inner_contiguous("x", x)
    tokens, depth = x.shape
    checks.tensor("weight", weight, (None, depth), tuple(DEPTH_OF), x.device)
    checks.contiguous("weight", weight)
    multiple = DEPTH_OF[weight.dtype]
    checks.require(depth > 0 and depth % multiple == 0, "x.shape[1]", depth, f"a multiple of {multiple}")
    rows = weight.shape[0]
    if (weight.dtype == torch.float8_e4m3fn) != (weight_scale is not None):
        raise ValueError(f"weight_scale={weight_scale!r}: expected a tensor with fp8 weights, None with bf16 ones")
    if weight_scale is not None:
        checks.tensor("weight_scale", weight_scale, (-(-rows // GROUP), depth // GROUP), torch.float32, x.device)
        checks.contiguous("weight_scale", weight_scale)
    if norm_weight is not None:
        checks.tensor("norm_weight", norm_weight, (depth,), torch.bfloat16, x.device)
        checks.contiguous("norm_weight", norm_weight)
    checks.positive_number("eps", eps)
    checks.choice("dtype", dtype, _OUT_DTYPES)
    return Linear(
        arch=device_arch(x.device),
        step=step or Step(),
        impl=impl,
        x=x,
        weight=weight,
        weight_scale=weight_scale,
        norm_weight=norm_weight,
        eps=float(eps),
        out=_output(out, (tokens, rows), dtype, x),
    )


@operation
def per_head(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    step: Step | None = None,
    impl: str | None = None,
) -> PerHead:
    """[T, H, N] bf16 = x[:, h] @ weight[h].T for each head, of x [T, H, K] bf16, K a multiple of 64.

    weight: [H, N, K] bf16, contiguous: as W_UK and W_UV lie in memory in SGLang, which names them by the transpose.
    out: [T, H, N] bf16, may be part of wider rows: the stride along N is 1.
    Raises ValueError for bad shapes, dtypes, strides or devices. Source: the absorbed projections of MLA (DeepSeek-V2).
    """
    checks.tensor("x", x, (None, None, None), torch.bfloat16)
    checks.inner_contiguous("x", x)
    tokens, heads, depth = x.shape
    multiple = DEPTH_OF[torch.bfloat16]
    checks.require(depth > 0 and depth % multiple == 0, "x.shape[2]", depth, f"a multiple of {multiple}")
    checks.tensor("weight", weight, (heads, None, depth), torch.bfloat16, x.device)
    checks.contiguous("weight", weight)
    rows = weight.shape[1]
    return PerHead(
        arch=device_arch(x.device),
        step=step or Step(),
        impl=impl,
        x=x,
        weight=weight,
        out=_output(out, (tokens, heads, rows), torch.bfloat16, x),
    )


def _output(out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    if out is None:
        return x.new_empty(shape, dtype=dtype)
    checks.tensor("out", out, shape, dtype, x.device)
    checks.inner_contiguous("out", out)
    return out
