"""Whether Triton kernels can run, and what the current target needs. Shared by every triton.py."""

from __future__ import annotations

import functools
import importlib.util

from nsa_backend_plugin.ops.support import YES, Support, no


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def available(arch: str) -> Support:
    """Support of a plain Triton kernel on an architecture."""
    if importlib.util.find_spec("triton") is None:
        return no("triton is not installed")
    if arch == "cpu":
        return YES if interpreted() else no("Triton needs a GPU (TRITON_INTERPRET=1 runs it on a CPU, slowly)")
    if arch.startswith(("sm_", "gfx")):
        return YES
    return no(f"Triton has no target for {arch}")


def has_e4m3(arch: str) -> bool:
    """Whether the hardware converts e4m3 in kernels: CUDA from sm_89 on, ROCm gfx94x, gfx95x, gfx12xx."""
    if arch.startswith("sm_"):
        return int(arch[3:]) >= 89
    return arch == "cpu" or arch.startswith(("gfx94", "gfx95", "gfx12"))
