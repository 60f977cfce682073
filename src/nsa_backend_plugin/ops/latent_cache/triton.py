"""Triton implementation of the latent cache: the kernels live in `_triton_pack.py` and `_triton_store.py`."""

from __future__ import annotations

from collections.abc import Iterator

from nsa_backend_plugin.ops._triton.support import CompileCase, available
from nsa_backend_plugin.ops.latent_cache import _triton_pack, _triton_store
from nsa_backend_plugin.ops.latent_cache._triton_pack import accepts_dequantize, accepts_quantize, dequantize, quantize
from nsa_backend_plugin.ops.latent_cache._triton_store import accepts_store, store

__all__ = [
    "accepts_dequantize",
    "accepts_quantize",
    "accepts_store",
    "available",
    "compile_cases",
    "dequantize",
    "quantize",
    "store",
]


def compile_cases(arch: str) -> Iterator[CompileCase]:
    yield from _triton_pack.compile_cases(arch)
    yield from _triton_store.compile_cases(arch)
