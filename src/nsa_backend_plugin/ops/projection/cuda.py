"""Projections in CUDA C++: the weights of a layer stream through the registers of the whole GPU (projection.cu)."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch

from nsa_backend_plugin.ops._cuda import jit
from nsa_backend_plugin.ops.arch import core_count, launches_early
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.projection import Linear, PerHead

_SOURCE = Path(__file__).with_name("projection.cu")
_BLOCK_BYTES = 128  # of a row of the weights
_TOKEN_TILES = (1, 2, 4)  # of 8 tokens
MAX_TOKENS = 32


class _Kind(NamedTuple):
    fp8: bool = False
    norm: bool = False
    out_f32: bool = False

    @property
    def defines(self) -> dict[str, int]:
        return {"FP8": int(self.fp8), "NORM": int(self.norm), "OUT_F32": int(self.out_f32)}


class _Variant(NamedTuple):
    kind: _Kind
    token_tiles: int
    warps_of_depth: int
    warps_of_rows: int
    blocks: int
    cluster: int
    share: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_of_depth * self.warps_of_rows

    @property
    def resident(self) -> int:
        """Blocks of threads on a multiprocessor, by their registers: 128 a thread."""
        return max(512 // self.threads, 1)

    @property
    def shared_bytes(self) -> int:
        """Of projection.cu's Shared; tokens are f16 beside fp8 weights."""
        tokens, bytes_of_one = 8 * self.token_tiles, _BLOCK_BYTES * (2 if self.kind.fp8 else 1)
        floats = tokens * (self.share + (self.share if self.kind.norm else 1) + 1)
        sums = 4 * self.threads * self.token_tiles
        return self.share * tokens * bytes_of_one + 4 * (floats + sums)


def available(arch: str) -> Reason:
    return jit.compiles(_SOURCE, arch, _defines(_Variant(_Kind(), 1, 1, 1, 1, 1, 1)))


def declines_linear(call: Linear) -> Reason:
    if call.weight_scale is not None and int(call.arch[3:]) < 89:
        return f"{call.arch} does not convert fp8"
    return _declines(call)


def _declines(call: Linear | PerHead) -> Reason:
    if call.x.shape[0] > MAX_TOKENS:
        return f"{call.x.shape[0]} tokens: at most {MAX_TOKENS}"
    sizes = _sizes_of(call)
    needed = max(v.shared_bytes for v in _variants(call.arch, sizes, core_count(call.x.device)))
    if needed > _shared_bytes(call.arch):
        return f"a depth of {sizes.blocks} x {_BLOCK_BYTES} bytes needs {needed} bytes of shared memory"
    return _misaligned(call)


declines_per_head = _declines


def _misaligned(call: Linear | PerHead) -> Reason:
    """Which tensor has a row that does not begin on a multiple of 16 bytes, which are loaded at a time."""
    for name in ("x", "weight", "norm_weight"):
        value = getattr(call, name, None)
        if value is None or value.is_meta:
            continue
        if value.data_ptr() % 16 or any(stride * value.element_size() % 16 for stride in value.stride() if stride != 1):
            return f"{name} does not lie on multiples of 16 bytes"
    return None


def _shared_bytes(arch: str) -> int:
    """That a block may have."""
    return {"sm_80": 163, "sm_87": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227}.get(arch, 99) << 10


class _Sizes(NamedTuple):
    """What a variant is made for."""

    kind: _Kind
    heads: int
    rows: int
    blocks: int  # of 128 bytes in a row of the weights


def _sizes_of(call: Linear | PerHead) -> _Sizes:
    *heads, rows, depth = call.weight.shape
    kind = _Kind()
    if isinstance(call, Linear):
        kind = _Kind(call.weight_scale is not None, call.norm_weight is not None, call.out.dtype == torch.float32)
    return _Sizes(kind, heads[0] if heads else 1, rows, depth * call.weight.element_size() // _BLOCK_BYTES)


def linear(call: Linear) -> torch.Tensor:
    _launch(call, (0, call.x.stride(0), 0, call.out.stride(0), 0))
    return call.out


def per_head(call: PerHead) -> torch.Tensor:
    strides = (2 * call.weight.stride(0), *call.x.stride()[:2], *call.out.stride()[:2])
    _launch(call, strides)
    return call.out


def _launch(call: Linear | PerHead, strides: tuple[int, ...]) -> None:
    tokens, depth, sizes = call.x.shape[0], call.x.shape[-1], _sizes_of(call)
    _, heads, rows, _ = sizes
    if tokens == 0 or rows == 0 or heads == 0:
        return
    cores = core_count(call.x.device)
    variant, kernel = _kernels(call.arch, sizes, cores)[next(t for t in _TOKEN_TILES if 8 * t >= tokens)]
    parts = -(-rows // (16 * variant.warps_of_rows))
    if heads == 1:
        # A block takes further rows for the same tokens.
        parts = min(parts, max(cores * variant.resident // variant.cluster, 1))
    jit.launch(
        kernel,
        grid=(parts * variant.cluster, heads, 1),
        block=(variant.threads, 1, 1),
        args=[_Arguments(*_pointers(call), *strides, tokens, rows, depth, getattr(call, "eps", 0.0))],
        shared_bytes=variant.shared_bytes,
        pdl=launches_early(call.arch),
        device=call.x.device,
    )


#: Tensors of a call, in the order of both sources' `Arguments`.
_TENSORS = ("weight", "weight_scale", "x", "norm_weight", "out")


def _pointers(call: Linear | PerHead) -> list[int | None]:
    tensors = (getattr(call, name, None) for name in _TENSORS)
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


class _Arguments(ctypes.Structure):
    """`Arguments` of projection.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        *((name, ctypes.c_longlong) for name in ("weight_head", "x_token", "x_head", "out_token", "out_head")),
        *((name, ctypes.c_int) for name in ("tokens", "rows", "depth")),
        ("eps", ctypes.c_float),
    )


@functools.cache
def _kernels(arch: str, sizes: _Sizes, cores: int) -> dict[int, tuple[_Variant, jit.Kernel]]:
    """By tiles of 8 tokens, all at once: the first call loads what any later, captured call may need."""
    variants = _variants(arch, sizes, cores)
    kernels = jit.load_all(_SOURCE, "projection", arch, list(map(_defines, variants)))
    return {v.token_tiles: (v, kernel) for v, kernel in zip(variants, kernels, strict=True)}


@functools.cache
def _variants(arch: str, sizes: _Sizes, cores: int) -> tuple[_Variant, ...]:
    """One for each number of token tiles.

    Found on an H200, 2026-11-27, by trying variants as `tools/tune_projection.py` does.
    """
    kind, heads, rows, blocks = sizes
    # Blocks may share the depth from sm_90 on. They do not exchange what a norm needs.
    cluster = 8 if blocks > 16 and int(arch[3:]) >= 90 and not kind.norm else 1
    share = -(-blocks // cluster)
    if cluster > 1 and heads * rows * cluster > 96 * cores:  # rows enough to share the tokens of a block
        of_depth, of_rows, at_once = -(-share // 8), 6, min(4, share)
    else:
        at_once = 1 if share <= 8 else 2
        of_depth = min(-(-share // at_once), 16)
        of_rows = 2 if of_depth <= 8 and cluster == 1 else 1
    return tuple(_Variant(kind, tiles, of_depth, of_rows, at_once, cluster, share) for tiles in _TOKEN_TILES)


def _defines(variant: _Variant) -> dict[str, int]:
    return {
        **variant.kind.defines,
        "TOKEN_TILES": variant.token_tiles,
        "WARPS_OF_DEPTH": variant.warps_of_depth,
        "WARPS_OF_ROWS": variant.warps_of_rows,
        "BLOCKS": variant.blocks,
        "CLUSTER": variant.cluster,
        "SHARE": variant.share,
        "RESIDENT": variant.resident,
        "SHARED_BYTES": variant.shared_bytes,
    }
