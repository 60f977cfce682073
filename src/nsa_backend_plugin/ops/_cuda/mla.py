"""Launching the CUDA C++ decode over fp8 rows (`mla_decode.cu`, `mla_merge.cu`), of sparse_mla and of dense_mla.

Triton reaches a quarter of the memory bandwidth here: its pipeliner leaves fp8 loads synchronous when one tile feeds
two products. A block gathers every row once for 16 heads; a second kernel, launched early, merges a token's splits.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nsa_backend_plugin.layouts import LATENT_DIM, ROPE_DIM, packed_latent_bytes
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops._cuda import jit
from nsa_backend_plugin.ops._torch.mla import MlaCall, Result
from nsa_backend_plugin.ops._torch.mla import result as as_result
from nsa_backend_plugin.ops.arch import core_count, device_arch, launches_early
from nsa_backend_plugin.ops.call import Reason

_DECODE = Path(__file__).with_name("mla_decode.cu")
_MERGE = Path(__file__).with_name("mla_merge.cu")
_TILE = 32  # rows of a tile, as in the source
_GROUP_HEADS = 16  # of a block
_DECODE_THREADS = 128
_MERGE_LANE_SPLITS = 4  # splits that one lane of the merge takes
_MAX_TOKENS = 65535  # grid dimension z
#: A warp of the merge, four splits a lane.
MOST_SPLITS = 128
#: What a block costs beside its tiles, and a split's merge, in the time of a tile.
_OVERHEAD_TILES = 4
_MAX_WAVES = 2  # of blocks, if a token is split
#: Blocks of the decode up to which the merge is launched at once: beside more, its waiting blocks take their places.
_MERGE_WAITS_BLOCKS = 64


@dataclass(frozen=True)
class Rows:
    """How a row lies in the cache and in shared memory, and into how many parts a token's are cut at most."""

    row_bytes: int
    pitch: int
    plain: bool
    max_splits: int


_PACKED_BYTES = packed_latent_bytes(LATENT_DIM + ROPE_DIM)
PACKED = Rows(_PACKED_BYTES, _PACKED_BYTES, plain=False, max_splits=32)
PLAIN = Rows(LATENT_DIM + ROPE_DIM, LATENT_DIM + ROPE_DIM + 16, plain=True, max_splits=MOST_SPLITS)


@dataclass(frozen=True)
class Config:
    """One compiled variant and the calls it is for.

    stages: tiles in flight. blocks_per_sm: that registers and shared memory allow. max_groups: tokens times groups of
    16 heads.
    """

    rows: Rows
    stages: int
    blocks_per_sm: int
    max_groups: int | None = None

    @property
    def defines(self) -> dict[str, object]:
        return {
            "STAGES": self.stages,
            "BLOCKS_PER_SM": self.blocks_per_sm,
            "SHARED_BYTES": self.shared_bytes,
            "ROW_BYTES": self.rows.row_bytes,
            "PITCH": self.rows.pitch,
            "PLAIN": int(self.rows.plain),
        }

    @property
    def shared_bytes(self) -> int:
        """sizeof(Shared) of the source, which asserts it."""
        return self.stages * (_TILE * self.rows.pitch + 8) + 4 * 16 * 40 * 4 + 16 * 40 * 2 + 16 * 4


#: Configurations per architecture, smallest calls first.
Configs = Mapping[str, tuple[Config, ...]]


def configs_of(rows: Rows, stages: int) -> Configs:
    """By an SM's shared memory, 228 KB or 100. stages: of the blocks that there are three of.

    sm_90 as measured: with few tokens, two blocks and deep pipelines beat three blocks and more splits.
    """
    large = (Config(rows, 4, 2, max_groups=32), Config(rows, stages, 3))
    small = (Config(rows, 3, 1),)
    return dict.fromkeys(("sm_90", "sm_100", "sm_103"), large) | dict.fromkeys(("sm_89", "sm_120", "sm_121"), small)


def available(arch: str, configs: Configs) -> Reason:
    if arch not in configs:
        return f"fp8 decode in CUDA C++ needs {', '.join(sorted(configs))}, not {arch}"
    reasons = [jit.compiles(_DECODE, arch, config.defines) for config in configs[arch]]
    reasons.append(jit.compiles(_MERGE, arch))
    return next((reason for reason in reasons if reason), None)


def declines(call: MlaCall) -> Reason:
    q, kv, out = call.q, call.kv, call.out
    tokens, _, query_dim = q.shape
    if q.dtype != torch.bfloat16:
        return f"q is {q.dtype}: only bfloat16"
    if (call.value_dim, query_dim) != (LATENT_DIM, LATENT_DIM + ROPE_DIM):
        return f"value_dim {call.value_dim} of {query_dim}: only {LATENT_DIM} of {LATENT_DIM + ROPE_DIM}"
    if tokens > _MAX_TOKENS:
        return f"{tokens} tokens: at most {_MAX_TOKENS}"
    if kv.stride(0) % 16 or q.data_ptr() % 16 or kv.data_ptr() % 16 or (out is not None and out.data_ptr() % 16):
        return "q, kv and out must start, and kv rows must lie, on multiples of 16 bytes"
    return None


def workspace_bytes(
    device: torch.device, configs: Configs, max_tokens: int, heads: int, value_dim: int, splits: int | None = None
) -> int:
    """Scratch for any call of up to max_tokens tokens. splits: of every call, None = chosen here."""
    found = configs[device_arch(device)]
    resident = max(resident_blocks(device, config) for config in found)
    parts = min(max_tokens * found[0].rows.max_splits, _MAX_WAVES * resident // groups(heads))
    return sum(layout(max_tokens * splits if splits else parts, heads, value_dim))


def attend(
    call: MlaCall,
    configs: Configs,
    table: torch.Tensor,
    lengths: torch.Tensor | None,
    keys: int,
    *,
    page_size: int = 1,
    leading: bool = True,
    splits: int | None = None,
) -> Result:
    """Attend every row of call.q to its keys, at most `keys`.

    table: [tokens, N] int32, slots of packed rows, or pages of plain ones, of which a token has lengths [tokens] keys.
    """
    q, kv, arch, unit = call.q, call.kv, call.arch, call.kv_unit
    out, lse = call.output(), call.new_lse()
    tokens, heads, _ = q.shape
    if tokens == 0:
        return as_result(out, lse)
    token_groups = tokens * groups(heads)
    config = _config(configs[arch], token_groups)
    if splits is None:
        splits = split_count(token_groups, keys, resident_blocks(q.device, config), config.rows.max_splits)
    result, result_lse, lse_unit = out.data_ptr(), 0 if lse is None else lse.data_ptr(), math.log(2)
    if splits > 1:
        sizes = layout(tokens * splits, heads, call.value_dim)
        workspace = checks.workspace(call.workspace, sum(sizes), q.device)
        result, result_lse, lse_unit = workspace.data_ptr(), workspace.data_ptr() + sizes[0], 1.0
    arguments = _DecodeArguments(
        q=q.data_ptr(),
        kv=kv.data_ptr(),
        table=table.data_ptr(),
        lengths=0 if lengths is None else lengths.data_ptr(),
        out=result,
        lse=result_lse,
        row_stride=kv.stride(0),
        table_stride=table.stride(0),
        scale_log2=call.softmax_scale * math.log2(math.e) * unit,
        value_scale=unit,
        lse_unit=lse_unit,
        heads=heads,
        topk=keys,
        splits=splits,
        page_bits=page_size.bit_length() - 1,
        merge_waits=splits > 1 and token_groups * splits <= _MERGE_WAITS_BLOCKS,
        leading=leading,
    )
    jit.launch(
        _decode_kernel(arch, config),
        (groups(heads), splits, tokens),
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
    """`Arguments` of mla_decode.cu, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "kv", "table", "lengths", "out", "lse")),
        *((name, ctypes.c_longlong) for name in ("row_stride", "table_stride")),
        *((name, ctypes.c_float) for name in ("scale_log2", "value_scale", "lse_unit")),
        *((name, ctypes.c_int) for name in ("heads", "topk", "splits", "page_bits", "merge_waits", "leading")),
    )


class _MergeArguments(ctypes.Structure):
    """`Arguments` of mla_merge.cu, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("partial_out", "partial_lse", "out", "lse")),
        *((name, ctypes.c_int) for name in ("splits", "lane_bits")),
    )


@functools.cache
def _decode_kernel(arch: str, config: Config) -> jit.Kernel:
    return jit.load(_DECODE, "mla_decode", arch, config.defines)


@functools.cache
def _merge_kernel(arch: str) -> jit.Kernel:
    return jit.load(_MERGE, "mla_merge", arch)


def groups(heads: int) -> int:
    return -(-heads // _GROUP_HEADS)


def _config(configs: tuple[Config, ...], token_groups: int) -> Config:
    return next(c for c in configs if c.max_groups is None or token_groups <= c.max_groups)


def resident_blocks(device: torch.device, config: Config) -> int:
    """Blocks that the GPU holds at once."""
    return core_count(device) * config.blocks_per_sm


@functools.lru_cache(maxsize=1024)
def split_count(token_groups: int, keys: int, resident: int, max_splits: int) -> int:
    """Parts of each token's rows: the fewest for which the waves of blocks that the GPU holds at once end soonest."""
    tiles = -(-keys // _TILE)
    most = min(max_splits, tiles, _MAX_WAVES * resident // token_groups)

    def time(splits: int) -> int:
        waves = -(-token_groups * splits // resident)
        return waves * (-(-tiles // splits) + _OVERHEAD_TILES)

    return min(range(1, max(most, 1) + 1), key=time)


def layout(parts: int, heads: int, value_dim: int) -> tuple[int, int]:
    """Bytes of bf16 outputs and log-sum-exps of `parts` = tokens * splits."""
    return -(-parts * heads * value_dim * 2 // 16) * 16, parts * heads * 4
