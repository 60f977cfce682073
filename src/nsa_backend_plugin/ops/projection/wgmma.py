"""Projections of up to 32 tokens by Hopper's warpgroup matrix instruction (wgmma.cu)."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch

from nsa_backend_plugin.ops._cuda import jit
from nsa_backend_plugin.ops.arch import core_count
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.projection import GROUP, Linear
from nsa_backend_plugin.ops.projection.cuda import (
    _BLOCK_BYTES,
    _TENSORS,
    _Kind,
    _misaligned,
    _pointers,
    _Sizes,
    _sizes_of,
)

_SOURCE = Path(__file__).with_name("wgmma.cu")
_ROWS = 64  # of the weights, for a block of threads
_STAGE_BYTES = _ROWS * _BLOCK_BYTES
_TOKENS = (16, 32)
_SHARED_BYTES = 227 << 10
MAX_TOKENS = _TOKENS[-1]


class _Variant(NamedTuple):
    kind: _Kind
    tokens: int
    warpgroups: int
    stages: int
    cluster: int
    share: int

    @property
    def shared_bytes(self) -> int:
        """Of wgmma.cu's Shared."""
        staged = self.stages * _STAGE_BYTES + 2 * self.tokens * _BLOCK_BYTES
        sums = 4 * self.tokens * (_ROWS + 4)
        norm = 2 * (GROUP * self.share if self.kind.norm else 8)
        return self.warpgroups * (max(staged, sums) + 4 * 3 * self.tokens + 8 * self.stages) + norm


def available(arch: str) -> Reason:
    if arch != "sm_90":
        return f"{arch} has no wgmma: it is Hopper's"
    return jit.compiles(_SOURCE, arch, _defines(_Variant(_Kind(True, False, False), 16, 1, 1, 1, 1)))


def declines_linear(call: Linear) -> Reason:
    if call.x.shape[0] > MAX_TOKENS:
        return f"{call.x.shape[0]} tokens: at most {MAX_TOKENS}"
    if call.norm_weight is not None and call.weight_scale is None:
        return "a norm before bf16 weights: only before fp8 ones"
    needed = max(variant.shared_bytes for variant in _variants(_sizes_of(call), core_count(call.x.device)))
    if needed > _SHARED_BYTES:
        return f"a depth of {call.x.shape[1]} needs {needed} bytes of shared memory: at most {_SHARED_BYTES}"
    return _misaligned(call)


def linear(call: Linear) -> torch.Tensor:
    tokens, rows = call.out.shape
    if tokens == 0 or rows == 0:
        return call.out
    sizes = _sizes_of(call)
    variant, kernel = _kernels(call.arch, sizes, core_count(call.x.device))[next(t for t in _TOKENS if t >= tokens)]
    jit.launch(
        kernel,
        grid=(-(-rows // _ROWS) * variant.cluster, 1, 1),
        block=(128 * variant.warpgroups, 1, 1),
        args=[_Arguments(*_pointers(call), call.x.stride(0), call.out.stride(0), tokens, rows, sizes.blocks, call.eps)],
        shared_bytes=variant.shared_bytes,
        pdl=True,
        device=call.x.device,
    )
    return call.out


class _Arguments(ctypes.Structure):
    """`Arguments` of wgmma.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        *((name, ctypes.c_longlong) for name in ("x_token", "out_token")),
        *((name, ctypes.c_int) for name in ("tokens", "rows", "blocks")),
        ("eps", ctypes.c_float),
    )


@functools.cache
def _kernels(arch: str, sizes: _Sizes, cores: int) -> dict[int, tuple[_Variant, jit.Kernel]]:
    """By the most tokens, all at once: the first call loads what any later, captured call may need."""
    variants = _variants(sizes, cores)
    kernels = jit.load_all(_SOURCE, "multiply_tokens", arch, list(map(_defines, variants)))
    return {v.tokens: (v, kernel) for v, kernel in zip(variants, kernels, strict=True)}


@functools.cache
def _variants(sizes: _Sizes, cores: int) -> tuple[_Variant, ...]:
    """One for each of _TOKENS. Rows enough for most multiprocessors need no cluster, which costs about a microsecond.

    Found on an H100, 2026-11-28, by trying variants as `tools/tune_projection.py` does.
    """
    kind, _, rows, blocks = sizes
    tiles = max(-(-rows // _ROWS), 1)
    cluster = 1 if 4 * tiles >= 3 * cores else min(8, 2 * cores // tiles, blocks)
    share = -(-blocks // cluster)
    cluster = -(-blocks // share)
    if cluster == 1:
        warpgroups = next((count for count in (4, 2) if count * tiles <= 4 * cores), 1)
    else:
        warpgroups = 1 if tiles * cluster > cores else 2
    stages = min(4, -(-share // warpgroups))  # more keep the next kernel's blocks out
    return tuple(_Variant(kind, tokens, warpgroups, stages, cluster, share) for tokens in _TOKENS)


def _defines(variant: _Variant) -> dict[str, int]:
    return {
        **variant.kind.defines,
        "TOKENS": variant.tokens,
        "WARPGROUPS": variant.warpgroups,
        "STAGES": variant.stages,
        "CLUSTER": variant.cluster,
        "SHARE": variant.share,
        "SHARED_BYTES": variant.shared_bytes,
    }
