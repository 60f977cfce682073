"""Sparse MLA decode over packed fp8 rows for up to 32 heads, in CUDA C++ (`packed_decode.cu`).

Triton reaches a quarter of the memory bandwidth here: its pipeliner leaves fp8 loads synchronous when one tile feeds
two products. The kernel gathers every row once for all heads, and combines the splits in the same launch.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from nsa_backend_plugin.layouts import LATENT_DIM, ROPE_DIM
from nsa_backend_plugin.ops import checks, cuda_jit
from nsa_backend_plugin.ops.arch import device_arch, launches_early
from nsa_backend_plugin.ops.support import YES, Support, no

_SOURCE = Path(__file__).with_name("packed_decode.cu")
_KERNEL = "packed_decode"
_TILE = 32  # rows of a tile, as in the source
_MAX_SPLITS = 32  # as in the source
_MAX_HEADS = 32
_MAX_TOKENS = 65535  # grid dimension y
_FLAG_BYTES = 8


@dataclass(frozen=True)
class Config:
    """One compiled variant and the calls it is for.

    head_groups: of up to 16 heads. stages: tiles in flight. blocks_per_sm: that registers and shared memory allow.
    """

    head_groups: int
    stages: int
    blocks_per_sm: int
    max_tokens: int = _MAX_TOKENS

    @property
    def defines(self) -> dict[str, object]:
        return {
            "HEAD_GROUPS": self.head_groups,
            "STAGES": self.stages,
            "BLOCKS_PER_SM": self.blocks_per_sm,
            "SHARED_BYTES": self.shared_bytes,
        }

    @property
    def threads(self) -> int:
        return 128 * self.head_groups

    @property
    def shared_bytes(self) -> int:
        """sizeof(Shared) of the source, which asserts it."""
        tiles = self.stages * _TILE * 656
        per_group = 4 * 16 * 40 * 4 + 16 * 40 * 2 + 16 * 4
        return tiles + self.head_groups * per_group + 2 * 8 * self.stages


#: Per architecture, smallest calls first. sm_90 and sm_10x have 228 KB of shared memory per SM, sm_89 and sm_12x 100.
#: sm_90 as measured: with few tokens, two blocks and deep pipelines beat three blocks and more splits.
_LARGE = (Config(1, 4, 2, max_tokens=32), Config(1, 2, 3), Config(2, 4, 1))
_SMALL = (Config(1, 3, 1), Config(2, 3, 1))
_CONFIGS = {
    "sm_90": _LARGE,
    "sm_100": _LARGE,
    "sm_103": _LARGE,
    "sm_89": _SMALL,
    "sm_120": _SMALL,
    "sm_121": _SMALL,
}


def available(arch: str) -> Support:
    if arch not in _CONFIGS:
        return no(f"packed fp8 decode in CUDA C++ needs {', '.join(sorted(_CONFIGS))}, not {arch}")
    verdicts = (cuda_jit.compiles(_SOURCE, arch, config.defines) for config in _CONFIGS[arch])
    return next((verdict for verdict in verdicts if not verdict.ok), YES)


def accepts_attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    *,
    kind: str,
    kv_scale: float | None,
    value_dim: int,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> Support:
    tokens, heads, query_dim = q.shape
    if kind != "packed":
        return no(f"kv is {kind}: only packed fp8 rows")
    if q.dtype != torch.bfloat16:
        return no(f"q is {q.dtype}: only bfloat16")
    if (value_dim, query_dim) != (LATENT_DIM, LATENT_DIM + ROPE_DIM):
        return no(f"value_dim {value_dim} of {query_dim}: only {LATENT_DIM} of {LATENT_DIM + ROPE_DIM}")
    if heads > _MAX_HEADS:
        return no(f"{heads} heads: at most {_MAX_HEADS}")
    if tokens > _MAX_TOKENS:
        return no(f"{tokens} tokens: at most {_MAX_TOKENS}")
    if kv.stride(0) % 16 or any(t.data_ptr() % 16 for t in (q, kv, out)):
        return no("q, kv and out must start, and kv rows must lie, on multiples of 16 bytes")
    return YES


def workspace_bytes_attend(device: torch.device, max_tokens: int, heads: int, topk: int, value_dim: int) -> int:
    """Scratch for any call of up to max_tokens tokens."""
    if heads > _MAX_HEADS:
        return 0
    configs = {_config(device_arch(device), heads, tokens) for tokens in (1, max_tokens)}
    parts = min(max_tokens * _MAX_SPLITS, max(_resident_blocks(device, config) for config in configs))
    return sum(_layout(parts, _MAX_SPLITS, heads, value_dim))


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    *,
    kind: str,
    kv_scale: float | None,
    value_dim: int,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> None:
    tokens, heads, _ = q.shape
    topk = indices.shape[1]
    if tokens == 0:
        return
    arch = device_arch(q.device)
    config = _config(arch, heads, tokens)
    splits = _split_count(tokens, topk, _resident_blocks(q.device, config))
    flags = partial_lse = partial_out = 0
    if splits > 1:
        sizes = _layout(tokens * splits, splits, heads, value_dim)
        workspace = _checked_workspace(workspace, sum(sizes), q.device)
        flags = workspace.data_ptr()
        partial_lse = flags + sizes[0]
        partial_out = partial_lse + sizes[1]
    arguments = _Arguments(
        q=q.data_ptr(),
        kv=kv.data_ptr(),
        indices=indices.data_ptr(),
        out=out.data_ptr(),
        lse=0 if lse is None else lse.data_ptr(),
        flags=flags,
        partial_lse=partial_lse,
        partial_out=partial_out,
        row_stride=kv.stride(0),
        scale_log2=softmax_scale * math.log2(math.e),
        heads=heads,
        topk=topk,
        splits=splits,
    )
    cuda_jit.launch(
        _kernel(arch, config),
        (splits, tokens, 1),
        (config.threads, 1, 1),
        [arguments],
        shared_bytes=config.shared_bytes,
        pdl=launches_early(arch),
        device=q.device,
    )


class _Arguments(ctypes.Structure):
    """`Arguments` of the source, field by field."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("kv", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("partial_lse", ctypes.c_void_p),
        ("partial_out", ctypes.c_void_p),
        ("row_stride", ctypes.c_longlong),
        ("scale_log2", ctypes.c_float),
        ("heads", ctypes.c_int),
        ("topk", ctypes.c_int),
        ("splits", ctypes.c_int),
    )


@functools.cache
def _kernel(arch: str, config: Config) -> cuda_jit.Kernel:
    return cuda_jit.load(_SOURCE, [_KERNEL], arch, config.defines)[_KERNEL]


def _config(arch: str, heads: int, tokens: int) -> Config:
    return next(c for c in _CONFIGS[arch] if heads <= 16 * c.head_groups and tokens <= c.max_tokens)


def _resident_blocks(device: torch.device, config: Config) -> int:
    """Blocks that the GPU holds at once. Blocks of a split token wait for each other, so a grid must not exceed it."""
    return torch.cuda.get_device_properties(device).multi_processor_count * config.blocks_per_sm


def _split_count(tokens: int, topk: int, resident_blocks: int) -> int:
    """Parts of each token's rows: as many as fill the GPU, then as few as keep the longest part as short."""
    tiles = -(-topk // _TILE)
    splits = min(_MAX_SPLITS, tiles, resident_blocks // tokens)
    if splits <= 1:
        return 1
    tiles_per_split = -(-tiles // splits)
    return -(-tiles // tiles_per_split)


def _layout(parts: int, splits: int, heads: int, value_dim: int) -> tuple[int, int, int]:
    """Bytes of flags (one per consumer and producer), log-sum-exps and bf16 outputs of `parts` = tokens * splits."""
    sizes = parts * splits * _FLAG_BYTES, parts * heads * 4, parts * heads * value_dim * 2
    flags, lse, partial_out = (-(-size // 16) * 16 for size in sizes)
    return flags, lse, partial_out


def _checked_workspace(workspace: torch.Tensor | None, needed: int, device: torch.device) -> torch.Tensor:
    if workspace is None:
        return torch.empty(needed, dtype=torch.uint8, device=device)
    checks.tensor("workspace", workspace, (None,), torch.uint8, device)
    checks.contiguous("workspace", workspace)
    checks.require(workspace.numel() >= needed, "workspace.numel()", workspace.numel(), f"at least {needed} bytes")
    checks.require(workspace.data_ptr() % 16 == 0, "workspace.data_ptr()", workspace.data_ptr(), "16-byte alignment")
    return workspace
