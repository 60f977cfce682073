"""Concatenations of MLA: absorbed query (nope | rope) and prefill key (nope | rope broadcast over heads)."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops.registry import Operation

_q_all = Operation("concat", "q_all")
_mla_k = Operation("concat", "mla_k")
_DTYPES = (*checks.FLOAT_DTYPES, *FP8_DTYPES)


def q_all(q_nope: torch.Tensor, q_rope: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """Absorbed query [T, H, 512+64] from its parts.

    q_nope: [T, H, 512], q_rope: [T, H, 64], same dtype and device. When both are adjacent slices of one
    [T, H, 576] buffer the result is a view of it and no kernel runs (the cat-skip path); otherwise a new contiguous
    tensor. Raises ValueError for bad shapes, dtypes or devices.
    """
    checks.tensor("q_nope", q_nope, (None, None, None), _DTYPES)
    checks.tensor("q_rope", q_rope, (*q_nope.shape[:2], None), q_nope.dtype, q_nope.device)
    checks.inner_contiguous("q_nope", q_nope)
    checks.inner_contiguous("q_rope", q_rope)
    if joined(q_nope, q_rope):
        shape = (*q_nope.shape[:2], q_nope.shape[2] + q_rope.shape[2])
        return q_nope.as_strided(shape, q_nope.stride())
    return _q_all(impl, q_nope.device, {"tokens": q_nope.shape[0], "heads": q_nope.shape[1]}, q_nope, q_rope)


def joined(q_nope: torch.Tensor, q_rope: torch.Tensor) -> bool:
    """Whether the two parts already lie next to each other in one contiguous [T, H, nope+rope] buffer."""
    width = q_nope.shape[2] + q_rope.shape[2]
    strides = (q_nope.shape[1] * width, width, 1)
    return (
        q_nope.stride() == strides
        and q_rope.stride() == strides
        and q_nope.untyped_storage().data_ptr() == q_rope.untyped_storage().data_ptr()
        and q_rope.storage_offset() == q_nope.storage_offset() + q_nope.shape[2]
    )


def mla_k(
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Prefill key [T, H, nope+rope]: k_rope is repeated for every head.

    k_nope: [T, H, 128], any strides with a contiguous last dimension (a slice of kv_b_proj's output).
    k_rope: [T, 1, 64], same dtype. dtype: of the result (None = k_nope's; fp8 saturates, without a scale).
    out: contiguous [T, H, nope+rope] to write into. Raises ValueError for bad shapes, dtypes or devices.
    Source: vLLM's direct-copy concat (seed 000); SGLang concat_mla_k.
    """
    checks.tensor("k_nope", k_nope, (None, None, None), _DTYPES)
    checks.tensor("k_rope", k_rope, (k_nope.shape[0], 1, None), k_nope.dtype, k_nope.device)
    checks.inner_contiguous("k_nope", k_nope)
    checks.inner_contiguous("k_rope", k_rope)
    dtype = dtype or (out.dtype if out is not None else k_nope.dtype)
    checks.choice("dtype", dtype, _DTYPES)
    shape = (*k_nope.shape[:2], k_nope.shape[2] + k_rope.shape[2])
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=k_nope.device)
    else:
        checks.tensor("out", out, shape, dtype, k_nope.device)
        checks.contiguous("out", out)
    summary = {"tokens": shape[0], "heads": shape[1], "nope": k_nope.shape[2], "rope": k_rope.shape[2]}
    _mla_k(impl, k_nope.device, summary, k_nope, k_rope, out=out)
    return out
