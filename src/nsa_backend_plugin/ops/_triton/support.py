"""Whether Triton kernels can run, and what the current target needs. Shared by every triton.py."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nsa_backend_plugin.ops.arch import arch_fp8_dtype, is_rocm
from nsa_backend_plugin.ops.call import Reason


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def available(arch: str) -> Reason:
    """Why a plain Triton kernel cannot run on an architecture."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if arch == "cpu":
        return None if interpreted() else "Triton needs a GPU (TRITON_INTERPRET=1 runs it on a CPU, slowly)"
    return None if arch.startswith(("sm_", "gfx")) else f"Triton has no target for {arch}"


def available_for_large_tiles(arch: str) -> Reason:
    """As `available`, of a kernel that holds more in registers than an RDNA lane has (256, in waves of 32)."""
    if is_rocm(arch) and not arch.startswith("gfx9"):
        return f"{arch}: its tiles need the registers of CDNA (gfx9), and would spill"
    return available(arch)


def has_e4m3(arch: str) -> bool:
    """Whether the hardware converts e4m3 in kernels: CUDA from sm_89 on, ROCm gfx94x, gfx95x, gfx12xx."""
    if arch.startswith("sm_"):
        return int(arch[3:]) >= 89
    return arch == "cpu" or arch.startswith(("gfx94", "gfx95", "gfx12"))


def fp8_pointer(arch: str) -> str:
    """Type, in a compile case's signature, of a pointer to an architecture's fp8 flavour."""
    return {torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e4m3fnuz: "*fp8e4b8"}[arch_fp8_dtype(arch)]


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration that the library can launch, for ahead-of-time compilation.

    Every triton.py defines `compile_cases(arch) -> Iterable[CompileCase]`, built from the same table that the
    launcher reads, so that the compile matrix covers each configuration a call can select.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]  # argument -> "*bf16", "*fp8e4nv", "i32", "fp32", ... of every runtime argument
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: Sequence[str] = ()  # arguments known to be multiples of 16 (pointers: 16-byte aligned)
    options: Mapping[str, Any] = field(default_factory=dict)  # other launch options, such as enable_fp_fusion
    most_spill_bytes: int = 0  # a lane, of a configuration that was measured to be the fastest nonetheless
    resident: int = 1  # programs that the size of the grid counts on a core to hold at once
