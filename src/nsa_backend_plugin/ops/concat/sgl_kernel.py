"""SGLang's CUDA kernel for the prefill key."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops.arch import is_cuda
from nsa_backend_plugin.ops.support import YES, Support, needs_module, no


def available(arch: str) -> Support:
    return needs_module("sgl_kernel") if is_cuda(arch) else no("sgl_kernel's concat_mla_k is CUDA only")


def accepts_mla_k(k_nope: torch.Tensor, k_rope: torch.Tensor, *, out: torch.Tensor) -> Support:
    shape, dtypes = (*k_nope.shape[1:], k_rope.shape[2]), {k_nope.dtype, out.dtype}
    if shape != (128, 128, 64) or dtypes != {torch.bfloat16}:
        return no(f"has bf16 with 128 heads of 128 + 64 only, not heads, nope, rope {shape} in {out.dtype}")
    return YES


def mla_k(k_nope: torch.Tensor, k_rope: torch.Tensor, *, out: torch.Tensor) -> None:
    from sgl_kernel import concat_mla_k

    if out.numel():
        concat_mla_k(out, k_nope, k_rope)
