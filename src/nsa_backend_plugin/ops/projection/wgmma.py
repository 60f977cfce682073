"""Projections of up to 64 tokens by Hopper's warpgroup matrix instruction (wgmma.cu)."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from nsa_backend_plugin.ops._cuda import jit
from nsa_backend_plugin.ops.arch import core_count
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.projection import GROUP, Linear

_SOURCE = Path(__file__).with_name("wgmma.cu")
_ROWS = 64  # of the weights, for a block of threads
_BLOCK_BYTES = 128  # of a row of the weights
_TOKENS = (16, 32, 64)
_SHARED_BYTES = 227 << 10
MAX_TOKENS = _TOKENS[-1]


class _Kind(NamedTuple):
    fp8: bool
    norm: bool
    out_f32: bool


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
        sums = 4 * self.tokens * (_ROWS + 4)
        of_stages = self.stages * (4 * self.tokens + 4)
        barriers = 8 * self.warpgroups * self.stages
        return _to_8(self.warpgroups * (max(self.stages * _stage_bytes(self.tokens), sums) + of_stages)) + barriers


def _stage_bytes(tokens: int) -> int:
    return (_ROWS + tokens) * _BLOCK_BYTES


def _to_8(count: int) -> int:
    return -(-count // 8) * 8


def available(arch: str) -> Reason:
    if arch != "sm_90":
        return f"{arch} has no wgmma: it is Hopper's"
    return jit.compiles(_SOURCE, arch, _defines(_Variant(_Kind(True, False, False), 16, 1, 1, 1, 1)))


def declines_linear(call: Linear) -> Reason:
    if call.x.shape[0] > MAX_TOKENS:
        return f"{call.x.shape[0]} tokens: at most {MAX_TOKENS}"
    if call.norm_weight is not None and call.weight_scale is None:
        return "a norm before bf16 weights: it normalizes what it quantizes"
    for name in ("x", "weight", "norm_weight"):
        value = getattr(call, name)
        if value is None or value.is_meta:
            continue
        if value.data_ptr() % 16 or any(stride * value.element_size() % 16 for stride in value.stride() if stride != 1):
            return f"{name} does not lie on multiples of 16 bytes"
    return None


def linear(call: Linear) -> torch.Tensor:
    tokens, rows = call.out.shape
    if tokens == 0 or rows == 0:
        return call.out
    kernels = _kernels(call.arch, *_sizes(call))[next(t for t in _TOKENS if t >= tokens)]
    x, scale = _quantize(call, kernels.quantize) if call.weight_scale is not None else (call.x, None)
    variant = kernels.variant
    _launch(
        kernels.multiply,
        _Arguments(
            *(call.weight.data_ptr(), _pointer(call.weight_scale), x.data_ptr(), _pointer(scale), call.out.data_ptr()),
            *(x.stride(0) * x.element_size(), call.out.stride(0)),
            *(tokens, rows, x.shape[1] * x.element_size() // _BLOCK_BYTES),
        ),
        (-(-rows // _ROWS) * variant.cluster, 128 * variant.warpgroups, variant.shared_bytes),
        call,
    )
    return call.out


def _quantize(call: Linear, kernel: jit.Kernel) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [T, K] e4m3, scales [K / 128, T]) of the call's tokens, normalized if it says so."""
    tokens, depth = call.x.shape
    values = call.x.new_empty(tokens, depth, dtype=torch.uint8)
    scales = call.x.new_empty(depth // GROUP, tokens, dtype=torch.float32)
    norm = _pointer(call.norm_weight)
    arguments = _Tokens(
        *(call.x.data_ptr(), norm, values.data_ptr(), scales.data_ptr(), call.x.stride(0), depth, call.eps)
    )
    _launch(kernel, arguments, (tokens, min(-(-depth // 256) * 32, 1024), 0), call)
    return values, scales


def _launch(kernel: jit.Kernel, arguments: ctypes.Structure, sizes: tuple[int, int, int], call: Linear) -> None:
    """sizes: blocks, threads of each and bytes of their shared memory."""
    blocks, threads, shared = sizes
    jit.launch(
        kernel,
        grid=(blocks, 1, 1),
        block=(threads, 1, 1),
        args=(arguments,),
        shared_bytes=shared,
        pdl=True,
        device=call.x.device,
    )


def _pointer(value: torch.Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()


class _Arguments(ctypes.Structure):
    """`Arguments` of wgmma.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "weight_scale", "x", "x_scale", "out")),
        *((name, ctypes.c_longlong) for name in ("x_token", "out_token")),
        *((name, ctypes.c_int) for name in ("tokens", "rows", "blocks")),
    )


class _Tokens(ctypes.Structure):
    """`Tokens` of wgmma.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "norm_weight", "values", "scale")),
        ("x_token", ctypes.c_longlong),
        ("depth", ctypes.c_int),
        ("eps", ctypes.c_float),
    )


class _Kernels(NamedTuple):
    variant: _Variant
    multiply: jit.Kernel
    quantize: jit.Kernel


def _sizes(call: Linear) -> tuple[_Kind, int, int, int]:
    """What a variant is made for: kind, rows, blocks of the depth, multiprocessors."""
    rows, depth = call.weight.shape
    kind = _Kind(call.weight_scale is not None, call.norm_weight is not None, call.out.dtype == torch.float32)
    return kind, rows, depth * call.weight.element_size() // _BLOCK_BYTES, core_count(call.x.device)


@functools.cache
def _kernels(arch: str, kind: _Kind, rows: int, blocks: int, cores: int) -> dict[int, _Kernels]:
    """By the most tokens, all at once: the first call loads what any later, captured call may need."""
    variants = _variants(kind, rows, blocks, cores)
    with ThreadPoolExecutor() as pool:
        loaded = pool.map(functools.partial(_load, arch), variants)
        return {v.tokens: kernels for v, kernels in zip(variants, loaded, strict=True)}


def _load(arch: str, variant: _Variant) -> _Kernels:
    found = jit.load(_SOURCE, ["multiply_tokens", "quantize_tokens"], arch, _defines(variant))
    return _Kernels(variant, found["multiply_tokens"], found["quantize_tokens"])


@functools.cache
def _variants(kind: _Kind, rows: int, blocks: int, cores: int) -> tuple[_Variant, ...]:
    """One for each of _TOKENS. Rows enough for most multiprocessors need no cluster, which costs about a microsecond.

    Found on an H100, 2026-11-28, by trying variants as `tools/tune_projection.py` does.
    """
    tiles = max(-(-rows // _ROWS), 1)
    cluster = 1 if 4 * tiles >= 3 * cores else min(8, 2 * cores // tiles, blocks)
    share = -(-blocks // cluster)
    cluster = -(-blocks // share)
    if cluster == 1:
        warpgroups = next((count for count in (4, 2) if count * tiles <= 4 * cores), 1)
    else:
        warpgroups = 1 if tiles * cluster > cores else 2
    passes = -(-share // warpgroups)
    room = (128 if tiles * cluster <= cores else 100) << 10
    return tuple(
        _Variant(
            kind,
            tokens,
            warpgroups,
            min(max(3, room // (warpgroups * _stage_bytes(tokens))), 6, passes),
            cluster,
            share,
        )
        for tokens in _TOKENS
    )


def _defines(variant: _Variant) -> dict[str, int]:
    return {
        "FP8": int(variant.kind.fp8),
        "NORM": int(variant.kind.norm),
        "OUT_F32": int(variant.kind.out_f32),
        "TOKENS": variant.tokens,
        "WARPGROUPS": variant.warpgroups,
        "STAGES": variant.stages,
        "CLUSTER": variant.cluster,
        "SHARE": variant.share,
        "SHARED_BYTES": variant.shared_bytes,
    }
