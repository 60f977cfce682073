"""SGLang's CUDA kernel for the prefill key: bf16, 128 heads of 128 + 64 values.

It takes strides, but reads 4 values of k_nope and 2 of k_rope at a time and divides the strides by as many: rows that
start elsewhere are misread without a word. Base addresses off 16 bytes it refuses.
Source: sgl-kernel/csrc/elementwise/concat_mla.cu of sgl-project/sglang.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._vendor import probe
from nsa_backend_plugin.ops.arch import is_cuda
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.concat import MlaK

_SHAPE = (128, 128, 64)


def available(arch: str) -> Reason:
    if not is_cuda(arch):
        return f"sgl_kernel's concat_mla_k is built for CUDA, not {arch}"
    return probe.missing("sgl_kernel", "concat_mla_k")


def declines_mla_k(call: MlaK) -> Reason:
    nope, rope, out = call.k_nope, call.k_rope, call.out
    shape = (*nope.shape[1:], rope.shape[2])
    if shape != _SHAPE or nope.dtype is not torch.bfloat16 or call.dtype is not torch.bfloat16:
        return f"heads, nope, rope {shape} in {nope.dtype} to {call.dtype}: bf16 with {_SHAPE} only"
    if nope.stride(0) % 4 or nope.stride(1) % 4 or rope.stride(0) % 2:
        return f"strides {nope.stride()} of k_nope or {rope.stride()} of k_rope: multiples of 4 and of 2 only"
    if nope.data_ptr() % 16 or rope.data_ptr() % 16 or (out is not None and out.data_ptr() % 16):
        return "k_nope, k_rope or out does not start at a 16-byte boundary"
    return None


def mla_k(call: MlaK) -> torch.Tensor:
    from sgl_kernel import concat_mla_k

    out = call.output()
    if out.numel():
        concat_mla_k(out, call.k_nope, call.k_rope)
    return out
