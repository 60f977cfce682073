"""Concatenations of MLA: absorbed query (nope | rope) and prefill key (nope | rope broadcast over heads)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.call import Call, Fact, Step
from nsa_backend_plugin.ops.dispatch import Operation, check_names, operation

_DTYPES = (*checks.FLOAT_DTYPES, *FP8_DTYPES)


@dataclass(slots=True, eq=False, kw_only=True)
class QAll(Call[torch.Tensor]):
    """The arguments of `q_all`, of parts that lie apart."""

    q_nope: torch.Tensor
    q_rope: torch.Tensor

    def facts(self) -> Mapping[str, Fact]:
        tokens, heads, nope = self.q_nope.shape
        rope = self.q_rope.shape[2]
        return {"tokens": tokens, "heads": heads, "nope": nope, "rope": rope, "dtype": str(self.q_nope.dtype)}

    def output(self) -> torch.Tensor:
        tokens, heads, nope = self.q_nope.shape
        return self.q_nope.new_empty(tokens, heads, nope + self.q_rope.shape[2])


@dataclass(slots=True, eq=False, kw_only=True)
class MlaK(Call[torch.Tensor]):
    """The arguments of `mla_k`; dtype is the result's."""

    k_nope: torch.Tensor
    k_rope: torch.Tensor
    dtype: torch.dtype
    out: torch.Tensor | None

    def facts(self) -> Mapping[str, Fact]:
        tokens, heads, nope = self.k_nope.shape
        source, target = str(self.k_nope.dtype), str(self.dtype)
        rope = self.k_rope.shape[2]
        return {"tokens": tokens, "heads": heads, "nope": nope, "rope": rope, "dtype": source, "to": target}

    def output(self) -> torch.Tensor:
        """The caller's out, or a new one."""
        if self.out is not None:
            return self.out
        tokens, heads, nope = self.k_nope.shape
        return self.k_nope.new_empty(tokens, heads, nope + self.k_rope.shape[2], dtype=self.dtype)


class _QAll(Operation[..., torch.Tensor]):
    """An operation that no implementation needs to run where the result is there already."""

    def __call__(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, *, step: Step | None = None, impl: str | None = None
    ) -> torch.Tensor:
        if impl is not None:
            check_names(self.op, [impl], "impl")
        view = joined(q_nope, q_rope)
        return super().__call__(q_nope, q_rope, step=step, impl=impl) if view is None else view


@_QAll
def q_all(q_nope: torch.Tensor, q_rope: torch.Tensor, *, step: Step | None = None, impl: str | None = None) -> QAll:
    """Absorbed query [T, H, 512+64] from its parts.

    q_nope: [T, H, 512], q_rope: [T, H, 64], same dtype and device, tokens and heads strided freely. When both are
    adjacent slices of one contiguous [T, H, 576] buffer the result is a view of it and no kernel runs (the cat-skip
    path); otherwise a new contiguous tensor. Raises ValueError for bad shapes, dtypes, strides or devices.
    """
    checks.tensor("q_nope", q_nope, (None, None, None), _DTYPES)
    tokens, heads, _ = q_nope.shape
    checks.tensor("q_rope", q_rope, (tokens, heads, None), q_nope.dtype, q_nope.device)
    checks.inner_contiguous("q_nope", q_nope)
    checks.inner_contiguous("q_rope", q_rope)
    return QAll(arch=device_arch(q_nope.device), step=step or Step(), impl=impl, q_nope=q_nope, q_rope=q_rope)


def joined(q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor | None:
    """The view over two valid parts that lie next to each other in one contiguous [T, H, nope+rope] buffer, or None."""
    if not (isinstance(q_nope, torch.Tensor) and isinstance(q_rope, torch.Tensor)):
        return None
    strides, dtype = q_nope.stride(), q_nope.dtype
    if len(strides) != 3 or strides != q_rope.stride() or dtype is not q_rope.dtype or dtype not in _DTYPES:
        return None
    (tokens, heads, nope), (*leading, rope) = q_nope.shape, q_rope.shape
    width = nope + rope
    if leading != [tokens, heads] or strides != (heads * width, width, 1):
        return None
    if q_rope.storage_offset() != q_nope.storage_offset() + nope:
        return None
    if q_rope.untyped_storage().data_ptr() != q_nope.untyped_storage().data_ptr():
        return None
    return q_nope.as_strided((tokens, heads, width), strides)


@operation
def mla_k(
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    step: Step | None = None,
    impl: str | None = None,
) -> MlaK:
    """Prefill key [T, H, nope+rope]: k_rope is repeated for every head.

    k_nope: [T, H, 128], any strides with a contiguous last dimension (a slice of kv_b_proj's output).
    k_rope: [T, 1, 64], same dtype. dtype: of the result (None = k_nope's; fp8 saturates, without a scale).
    out: contiguous [T, H, nope+rope] to write into. Raises ValueError for bad shapes, dtypes, strides or devices.
    Source: vLLM's copy into the result in place of a cat (its benchmark_mla_k_concat.py); SGLang concat_mla_k.
    """
    checks.tensor("k_nope", k_nope, (None, None, None), _DTYPES)
    tokens, heads, nope = k_nope.shape
    checks.tensor("k_rope", k_rope, (tokens, 1, None), k_nope.dtype, k_nope.device)
    checks.inner_contiguous("k_nope", k_nope)
    checks.inner_contiguous("k_rope", k_rope)
    dtype = dtype or (out.dtype if isinstance(out, torch.Tensor) else k_nope.dtype)
    checks.choice("dtype", dtype, _DTYPES)
    if out is not None:
        checks.tensor("out", out, (tokens, heads, nope + k_rope.shape[2]), dtype, k_nope.device)
        checks.contiguous("out", out)
    return MlaK(
        arch=device_arch(k_nope.device),
        step=step or Step(),
        impl=impl,
        k_nope=k_nope,
        k_rope=k_rope,
        dtype=dtype,
        out=out,
    )
