"""Whether Triton kernels can run, and what the current target needs. Shared by every triton.py."""

from __future__ import annotations

import functools
import importlib.util

from nsa_backend_plugin.ops.arch import is_rocm
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
