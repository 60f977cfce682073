"""Sparse MLA decode over packed fp8 rows, in CUDA C++ (`packed_decode.cu`, `packed_merge.cu`).

Triton reaches a quarter of the memory bandwidth here: its pipeliner leaves fp8 loads synchronous when one tile feeds
two products. A block gathers every row once for 16 heads; a second kernel, launched early, merges a token's splits.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from nsa_backend_plugin.layouts import LATENT_DIM, ROPE_DIM, packed_latent_bytes
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops._cuda import jit
from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops._torch.mla import result as as_result
from nsa_backend_plugin.ops.arch import core_count, device_arch, launches_early
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.sparse_mla import Attend

_DECODE = Path(__file__).with_name("packed_decode.cu")
_MERGE = Path(__file__).with_name("packed_merge.cu")
_ROW_BYTES = packed_latent_bytes(LATENT_DIM + ROPE_DIM)
_TILE = 32  # rows of a tile, as in the source
_GROUP_HEADS = 16  # of a block
_DECODE_THREADS = 128
_MAX_SPLITS = 32  # a lane of a warp each
_MAX_TOKENS = 65535  # grid dimension z
_MERGE_LANE_SPLITS = 4  # splits that one lane of the merge takes
#: What a block costs beside its tiles, and a split's merge, in the time of a tile.
_OVERHEAD_TILES = 4
_MAX_WAVES = 2  # of blocks, if a token is split
#: Blocks of the decode up to which the merge is launched at once: beside more, its waiting blocks take their places.
_MERGE_WAITS_BLOCKS = 64


@dataclass(frozen=True)
class Config:
    """One compiled variant and the calls it is for.

    stages: tiles in flight. blocks_per_sm: that registers and shared memory allow. max_groups: tokens times groups of
    16 heads.
    """

    stages: int
    blocks_per_sm: int
    max_groups: int | None = None

    @property
    def defines(self) -> dict[str, object]:
        return {
            "STAGES": self.stages,
            "BLOCKS_PER_SM": self.blocks_per_sm,
            "SHARED_BYTES": self.shared_bytes,
            "ROW_BYTES": _ROW_BYTES,
        }

    @property
    def shared_bytes(self) -> int:
        """sizeof(Shared) of the source, which asserts it."""
        return self.stages * (_TILE * _ROW_BYTES + 8) + 4 * 16 * 40 * 4 + 16 * 40 * 2 + 16 * 4


#: Per architecture, smallest calls first. sm_90 and sm_10x have 228 KB of shared memory per SM, sm_89 and sm_12x 100.
#: sm_90 as measured: with few tokens, two blocks and deep pipelines beat three blocks and more splits.
_LARGE = (Config(4, 2, max_groups=32), Config(2, 3))
_SMALL = (Config(3, 1),)
_CONFIGS = {
    "sm_90": _LARGE,
    "sm_100": _LARGE,
    "sm_103": _LARGE,
    "sm_89": _SMALL,
    "sm_120": _SMALL,
    "sm_121": _SMALL,
}


def available(arch: str) -> Reason:
    if arch not in _CONFIGS:
        return f"packed fp8 decode in CUDA C++ needs {', '.join(sorted(_CONFIGS))}, not {arch}"
    reasons = [jit.compiles(_DECODE, arch, config.defines) for config in _CONFIGS[arch]]
    reasons.append(jit.compiles(_MERGE, arch))
    return next((reason for reason in reasons if reason), None)


def declines_attend(call: Attend) -> Reason:
    q, kv, out = call.q, call.kv, call.out
    tokens, _, query_dim = q.shape
    if call.kind != "packed":
        return f"kv is {call.kind}: only packed fp8 rows"
    if q.dtype != torch.bfloat16:
        return f"q is {q.dtype}: only bfloat16"
    if (call.value_dim, query_dim) != (LATENT_DIM, LATENT_DIM + ROPE_DIM):
        return f"value_dim {call.value_dim} of {query_dim}: only {LATENT_DIM} of {LATENT_DIM + ROPE_DIM}"
    if tokens > _MAX_TOKENS:
        return f"{tokens} tokens: at most {_MAX_TOKENS}"
    if kv.stride(0) % 16 or q.data_ptr() % 16 or kv.data_ptr() % 16 or (out is not None and out.data_ptr() % 16):
        return "q, kv and out must start, and kv rows must lie, on multiples of 16 bytes"
    return None


def workspace_bytes_attend(device: torch.device, max_tokens: int, heads: int, topk: int, value_dim: int) -> int:
    """Scratch for any call of up to max_tokens tokens."""
    groups = _groups(heads)
    resident = max(_resident_blocks(device, config) for config in _CONFIGS[device_arch(device)])
    parts = min(max_tokens * _MAX_SPLITS, _MAX_WAVES * resident // groups)
    return sum(_layout(parts, heads, value_dim))


def attend(call: Attend) -> Result:
    q, kv, indices, arch = call.q, call.kv, call.indices, call.arch
    out, lse = call.output(), call.new_lse()
    tokens, heads, _ = q.shape
    topk = indices.shape[1]
    if tokens == 0:
        return as_result(out, lse)
    groups = _groups(heads)
    config = _config(arch, tokens * groups)
    splits = _split_count(tokens * groups, topk, _resident_blocks(q.device, config))
    result, result_lse, lse_unit = out.data_ptr(), 0 if lse is None else lse.data_ptr(), math.log(2)
    if splits > 1:
        sizes = _layout(tokens * splits, heads, call.value_dim)
        workspace = checks.workspace(call.workspace, sum(sizes), q.device)
        result, result_lse, lse_unit = workspace.data_ptr(), workspace.data_ptr() + sizes[0], 1.0
    arguments = _DecodeArguments(
        q=q.data_ptr(),
        kv=kv.data_ptr(),
        indices=indices.data_ptr(),
        out=result,
        lse=result_lse,
        row_stride=kv.stride(0),
        scale_log2=call.softmax_scale * math.log2(math.e),
        lse_unit=lse_unit,
        heads=heads,
        topk=topk,
        splits=splits,
        merge_waits=splits > 1 and tokens * groups * splits <= _MERGE_WAITS_BLOCKS,
        leading=call.lengths is not None,
    )
    jit.launch(
        _decode_kernel(arch, config),
        (groups, splits, tokens),
        (_DECODE_THREADS, 1, 1),
        [arguments],
        shared_bytes=config.shared_bytes,
        pdl=launches_early(arch),
        device=q.device,
    )
    if splits > 1:
        _merge(arch, result, result_lse, out, lse, splits)
    return as_result(out, lse)


def _merge(
    arch: str, partial_out: int, partial_lse: int, out: torch.Tensor, lse: torch.Tensor | None, splits: int
) -> None:
    tokens, heads, value_dim = out.shape
    lane_bits = (-(-splits // _MERGE_LANE_SPLITS) - 1).bit_length()
    arguments = _MergeArguments(
        partial_out=partial_out,
        partial_lse=partial_lse,
        out=out.data_ptr(),
        lse=0 if lse is None else lse.data_ptr(),
        splits=splits,
        lane_bits=lane_bits,
    )
    jit.launch(
        _merge_kernel(arch),
        (1 << lane_bits, heads, tokens),
        (value_dim // 8, 1, 1),
        [arguments],
        pdl=launches_early(arch),
        device=out.device,
    )


class _DecodeArguments(ctypes.Structure):
    """`Arguments` of packed_decode.cu, field by field."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("kv", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("row_stride", ctypes.c_longlong),
        ("scale_log2", ctypes.c_float),
        ("lse_unit", ctypes.c_float),
        ("heads", ctypes.c_int),
        ("topk", ctypes.c_int),
        ("splits", ctypes.c_int),
        ("merge_waits", ctypes.c_int),
        ("leading", ctypes.c_int),
    )


class _MergeArguments(ctypes.Structure):
    """`Arguments` of packed_merge.cu, field by field."""

    _fields_ = (
        ("partial_out", ctypes.c_void_p),
        ("partial_lse", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("splits", ctypes.c_int),
        ("lane_bits", ctypes.c_int),
    )


@functools.cache
def _decode_kernel(arch: str, config: Config) -> jit.Kernel:
    return jit.load(_DECODE, ["packed_decode"], arch, config.defines)["packed_decode"]


@functools.cache
def _merge_kernel(arch: str) -> jit.Kernel:
    return jit.load(_MERGE, ["packed_merge"], arch)["packed_merge"]


def _groups(heads: int) -> int:
    return -(-heads // _GROUP_HEADS)


def _config(arch: str, token_groups: int) -> Config:
    return next(c for c in _CONFIGS[arch] if c.max_groups is None or token_groups <= c.max_groups)


def _resident_blocks(device: torch.device, config: Config) -> int:
    """Blocks that the GPU holds at once."""
    return core_count(device) * config.blocks_per_sm


@functools.lru_cache(maxsize=1024)
def _split_count(token_groups: int, topk: int, resident_blocks: int) -> int:
    """Parts of each token's rows: the fewest for which the waves of blocks that the GPU holds at once end soonest."""
    tiles = -(-topk // _TILE)
    most = min(_MAX_SPLITS, tiles, _MAX_WAVES * resident_blocks // token_groups)

    def time(splits: int) -> int:
        waves = -(-token_groups * splits // resident_blocks)
        return waves * (-(-tiles // splits) + _OVERHEAD_TILES)

    return min(range(1, max(most, 1) + 1), key=time)


def _layout(parts: int, heads: int, value_dim: int) -> tuple[int, int]:
    """Bytes of bf16 outputs and log-sum-exps of `parts` = tokens * splits."""
    return -(-parts * heads * value_dim * 2 // 16) * 16, parts * heads * 4
