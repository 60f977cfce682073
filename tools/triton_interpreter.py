"""Make Triton's interpreter convert floats as GPUs do.

It rounds fp32 -> bf16 towards zero and carries fp32 -> fp8 wrongly at binade edges (Triton 3.6), so byte-exact
comparisons would fail on the CPU for no fault of the kernel. torch's conversions replace its own. For tests and
benchmarks: importing this module changes the interpreter of the process.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5: torch.float8_e5m2,
}
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_triton_convert = interpreter._convert_float
_triton_dot = interpreter.InterpreterBuilder.create_dot
_triton_patch_lang = interpreter._patch_lang_core


def _convert_float(data, source, target, rounding_mode):
    """Round to nearest even; fp8 saturates, as the hardware instructions do."""
    if source not in _TORCH or target not in _TORCH or rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
        return _triton_convert(data, source, target, rounding_mode)
    raw = np.ascontiguousarray(data).view(_BITS[data.itemsize])
    value = torch.from_numpy(raw.copy()).view(_TORCH[source]).float()
    dtype = _TORCH[target]
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        value = value.clamp(-limit, limit)
    result = value.to(dtype)
    return result.view(getattr(torch, f"uint{8 * dtype.itemsize}")).numpy().reshape(data.shape)


def _patch_lang_core(lang, scope):
    """Also let the interpreter name e4m3fnuz, the fp8 type of gfx942."""
    _triton_patch_lang(lang, scope)
    to_ir = lang.dtype.to_ir

    def to_ir_with_fnuz(self, builder):
        return builder.get_fp8e4b8_ty() if self.name == "fp8e4b8" else to_ir(self, builder)

    scope.set_attr(lang.dtype, "to_ir", to_ir_with_fnuz)


def _create_dot(self, a, b, *rest):
    """bf16 is held as its 16 bits; the interpreter would multiply those as integers."""
    widened = [
        interpreter.TensorHandle(_convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)
        if x.dtype.scalar == tl.bfloat16
        else x
        for x in (a, b)
    ]
    return _triton_dot(self, *widened, *rest)


interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter._convert_float = _convert_float
interpreter._patch_lang_core = _patch_lang_core
