"""RMS norm and the fp8 quantization of its result in one step: the input of a block-fp8 GEMM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nsa_backend_plugin.layouts import SCALE_FORMATS
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops.arch import arch_fp8_dtype, device_arch
from nsa_backend_plugin.ops.call import Call, Fact, Step
from nsa_backend_plugin.ops.dispatch import operation

GROUP = 128  # values that share a scale
_ALIGNMENT = 4  # scales: 16 bytes, what a TMA load starts on

Result = tuple[torch.Tensor, torch.Tensor]


@dataclass(slots=True, eq=False, kw_only=True)
class Rms(Call[Result]):
    """The arguments of `rms`."""

    x: torch.Tensor
    weight: torch.Tensor
    eps: float
    scale_format: str

    def facts(self) -> Mapping[str, Fact]:
        tokens, width = self.x.shape
        return {"tokens": tokens, "width": width, "dtype": str(self.x.dtype), "scale_format": self.scale_format}

    @property
    def fp8_dtype(self) -> torch.dtype:
        return arch_fp8_dtype(self.arch)

    def output(self) -> Result:
        """New values [T, N], and scales [T, N / 128] whose columns start on multiples of 16 bytes."""
        tokens, width = self.x.shape
        padded = -(-tokens // _ALIGNMENT) * _ALIGNMENT
        scales = self.x.new_empty(width // GROUP, padded, dtype=torch.float32).t()[:tokens]
        return self.x.new_empty(tokens, width, dtype=self.fp8_dtype), scales


@operation
def rms(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    scale_format: str = "fp32",
    step: Step | None = None,
    impl: str | None = None,
) -> Rms:
    """(values [T, N] fp8, scales [T, N / 128] fp32): values * scales is the RMS norm of x, rounded to x's dtype.

    x: [T, N] bf16/fp16/fp32, rows strided freely, N a multiple of 128. weight: [N], contiguous.
    A scale is max(amax, 1e-4) / fp8 max of 128 values, rounded up to a power of two with scale_format "ue8m0". The
    scales lie column by column, each column on a multiple of 16 bytes, as DeepGEMM reads them.
    Raises ValueError for bad shapes, dtypes, strides or devices. Source: SGLang's RMSNorm and per-token-group
    quantization.
    """
    checks.tensor("x", x, (None, None), checks.FLOAT_DTYPES)
    checks.inner_contiguous("x", x)
    width = x.shape[1]
    checks.require(width > 0 and width % GROUP == 0, "x.shape[1]", width, f"a multiple of {GROUP}")
    checks.tensor("weight", weight, (width,), checks.FLOAT_DTYPES, x.device)
    checks.contiguous("weight", weight)
    checks.positive_number("eps", eps)
    checks.choice("scale_format", scale_format, SCALE_FORMATS)
    return Rms(
        arch=device_arch(x.device),
        step=step or Step(),
        impl=impl,
        x=x,
        weight=weight,
        eps=float(eps),
        scale_format=scale_format,
    )
