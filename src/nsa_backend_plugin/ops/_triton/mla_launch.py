"""Launching the MLA attention kernels: tile sizes and split counts from architecture and shape, scratch, launch.

Shared by `sparse_mla/triton.py` and `dense_mla/triton.py`. Nothing here is tuned at serving time: `tile` and
`split_count` are the tables, and `tools/tune_mla.py` is how their sm_90 rows were found. AMD rows are
compile-checked, not run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton

from nsa_backend_plugin.layouts import LATENT_TILE
from nsa_backend_plugin.ops import checks
from nsa_backend_plugin.ops._torch.mla import MlaCall, Result, result
from nsa_backend_plugin.ops._triton import early_launch, quant
from nsa_backend_plugin.ops._triton.launch import launch
from nsa_backend_plugin.ops._triton.mla_kernels import attend_kernel, combine_kernel
from nsa_backend_plugin.ops.arch import core_count, is_rocm
from nsa_backend_plugin.ops.call import Reason

#: No row of up to 16 heads is cut into more parts; with more heads, which have more to merge, half as many.
MAX_SPLITS = 128
#: Same limit for a caller's own split count: the combine kernel holds one value of every part in registers.
MAX_FORCED_SPLITS = 256
#: Keys of a part below which more parts gain nothing, but on cores that would have none.
_LEAST_KEYS = 128
#: Values of the parts that one warp of the combine kernel keeps in registers.
_VALUES_PER_WARP = 4096
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tile:
    """One configuration of `attend_kernel`. `swap` computes keys x heads, which fits AMD's matrix units.

    per_core: programs that a multiprocessor (compute unit) holds at once (registers, shared memory). A load of slots
    precedes each load of keys: Triton keeps (num_stages - 1) // 2 tiles of keys in flight.
    """

    heads: int
    keys: int
    num_warps: int
    num_stages: int
    swap: bool = False
    per_core: int = field(default=1, repr=False)


Tiles = dict[str, tuple[Tile, ...]]

# Kinds: "bf16" rows selected by slot, "pages" of bf16 rows, "packed" and "fp8" rows.
# Measured on an H200 (tools/tune_mla.py, 2026-11-21); the largest tile listed serves every larger head count, in
# blocks.
_WIDE = (Tile(32, 64, 8, 3), Tile(64, 64, 8, 2))
_SM_90: Tiles = {
    "bf16": (Tile(16, 32, 4, 5, per_core=2), *_WIDE),
    "pages": (Tile(16, 64, 4, 3, per_core=2), *_WIDE),
    "packed": (Tile(16, 32, 8, 2),),
    # Not measured: what compiles without spills. A tile of 64 heads converts a row once for all of them.
    "fp8": (Tile(16, 32, 8, 2), Tile(64, 32, 8, 3)),
}
# By rule, from here on: fit the architecture's shared memory (KB in the name) and compile without spills.
# On sm_100 a 64-head tile would go through tensor memory, which Triton stages beyond the shared memory there is.
_SM_100: Tiles = {**_SM_90, "bf16": _SM_90["bf16"][:2], "pages": _SM_90["pages"][:2], "fp8": _SM_90["fp8"][:1]}
_CUDA_99: Tiles = {
    "bf16": (Tile(16, 32, 4, 3), Tile(32, 32, 8, 2)),
    "packed": (Tile(16, 32, 8, 2),),
    "fp8": (Tile(16, 32, 8, 2),),
}
_CUDA_163: Tiles = {**_CUDA_99, "bf16": (Tile(16, 64, 4, 3), Tile(32, 64, 8, 3), Tile(64, 32, 8, 2))}
_AMD: Tiles = {
    "bf16": (Tile(16, 64, 4, 1, swap=True),),
    "packed": (Tile(16, 32, 4, 1, swap=True),),
    "fp8": (Tile(16, 32, 4, 1, swap=True),),
}
_TILES = {"sm_80": _CUDA_163, "sm_90": _SM_90, "sm_100": _SM_100}


def tile(arch: str, kind: str, heads: int) -> Tile:
    """The smallest tile that holds all heads, else the largest. kind: "bf16" (and fp16), "pages", "packed" or "fp8"."""
    table = _TILES.get(arch, _AMD if is_rocm(arch) else _CUDA_99)
    tiles = table.get(kind) or table["bf16"]  # "pages" have tiles of their own where they were tuned
    return next((t for t in tiles if t.heads >= heads), tiles[-1])


def split_count(cores: int, rows: int, heads: int, keys: int, config: Tile) -> int:
    """Parts to cut each row's keys into: as many as fill the device, none without a tile of keys.

    A second program on a core hides the first one's latency, but not where it leaves both a few keys.
    """
    blocks = max(1, rows * triton.cdiv(heads, config.heads))
    worthwhile = max(keys // _LEAST_KEYS, cores // blocks)
    limit = MAX_SPLITS if config.heads <= 16 else MAX_SPLITS // 2
    return max(1, min(config.per_core * cores // blocks, worthwhile, triton.cdiv(keys, config.keys), limit))


def scratch_bytes(parts: int, heads: int, value_dim: int) -> int:
    """Scratch of `parts` (rows x splits): output and log-sum-exp per part and head, in fp32.

    fp32 because one more rounding to bf16 would use up the accuracy bar; the parts stay in L2 in either size.
    """
    return _lse_bytes(parts, heads) + parts * heads * value_dim * 4


def workspace_bytes(
    device: torch.device, max_rows: int, heads: int, value_dim: int, num_kv_splits: int | None = None
) -> int:
    """Scratch that suffices on a device for every call of up to max_rows rows."""
    if num_kv_splits is not None:
        return scratch_bytes(max_rows * num_kv_splits, heads, value_dim)
    # split_count keeps rows * splits <= the programs of a full device whenever it splits at all.
    parts = min(max_rows * MAX_SPLITS, 2 * core_count(device))
    return scratch_bytes(parts, heads, value_dim)


def _lse_bytes(parts: int, heads: int) -> int:
    return triton.cdiv(parts * heads * 4, 16) * 16


def _scratch(workspace: torch.Tensor | None, parts: int, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(partial_out [parts, H, value_dim], partial_lse [parts, H]), fp32, inside the workspace."""
    heads, value_dim = out.shape[1:]
    needed = scratch_bytes(parts, heads, value_dim)
    workspace = checks.workspace(workspace, needed, out.device)
    start = _lse_bytes(parts, heads)
    return workspace[start:needed].view(torch.float32), workspace[: parts * heads * 4].view(torch.float32)


def declines(call: MlaCall, kind: str) -> Reason:
    """Why the kernels do not take a call's dtypes and dimensions."""
    q, kv, value_dim = call.q, call.kv, call.value_dim
    rope_dim = q.shape[-1] - value_dim
    chunk = min(value_dim, LATENT_TILE)
    if value_dim % chunk or not _dot_size(chunk) or not _dot_size(rope_dim):
        return (
            f"value_dim={value_dim}, rope part {rope_dim}: needs a power of two (>= 16) or a multiple of "
            f"{LATENT_TILE}, and a power of two"
        )
    if q.dtype == torch.float32:
        return "q is float32: matrix units would round it, torch is exact"
    if kind == "bf16":
        return None if kv.dtype == q.dtype else f"kv is {kv.dtype} but q is {q.dtype}"
    if kind == "packed" and q.dtype != torch.bfloat16:
        return f"q is {q.dtype}: packed rows are widened to bfloat16, whose range they need"
    if kind == "packed" and (kv.stride(0) % 4 or kv.data_ptr() % 4):
        return "packed rows are not aligned to 4 bytes"
    return quant.declines_fp8(call.arch, torch.float8_e4m3fn if kind == "packed" else kv.dtype)


def _dot_size(size: int) -> bool:
    return size >= 16 and size & (size - 1) == 0


def attend(
    call: MlaCall,
    table: torch.Tensor,
    lengths: torch.Tensor,
    keys: int,
    *,
    kind: str,
    page_size: int = 0,
    splits: int | None = None,
) -> Result:
    """Attend every row of call.q [rows, H, D] to its keys, of which it has lengths [rows], at most `keys`.

    table: pages; with page_size 0 slots [rows, K], -1 = none. splits: parts that each row's keys are cut into.
    """
    q, kv, out, lse, unit = call.q, call.kv, call.output(), call.new_lse(), call.kv_unit
    rows, heads, query_dim = q.shape
    value_dim = out.shape[-1]
    if rows == 0:
        return result(out, lse)
    config = tile(call.arch, "pages" if kind == "bf16" and page_size else kind, heads)
    splits = splits or split_count(core_count(q.device), rows, heads, keys, config)
    split = splits > 1
    partial_out, partial_lse = _scratch(call.workspace, rows * splits, out) if split else (out, out)
    early = early_launch.options(call.arch)
    launch(
        attend_kernel,
        (rows * splits * triton.cdiv(heads, config.heads),),
        q,
        kv.view(torch.uint8) if kind == "packed" else kv,
        table,
        lengths,
        out,
        out if lse is None else lse,
        partial_out,
        partial_lse,
        call.softmax_scale * LOG2_E * unit,
        unit,
        kv.stride(0),
        table.stride(0),
        splits,
        HEADS=heads,
        VALUE_DIM=value_dim,
        ROPE_DIM=query_dim - value_dim,
        CHUNK=min(value_dim, LATENT_TILE),
        PAGE_SIZE=page_size,
        PACKED=kind == "packed",
        SPLIT=split,
        WRITE_LSE=lse is not None,
        HEAD_TILE=config.heads,
        KEY_TILE=config.keys,
        STAGES=config.num_stages,
        SWAP=config.swap,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        resident=config.per_core,
        **early,
    )
    if split:
        dims, split_tile, warps = _combine_config(rows, heads, value_dim, splits)
        launch(
            combine_kernel,
            (rows, heads, value_dim // dims),
            partial_out,
            partial_lse,
            out,
            out if lse is None else lse,
            splits,
            HEADS=heads,
            VALUE_DIM=value_dim,
            DIM_TILE=dims,
            SPLIT_TILE=split_tile,
            WRITE_LSE=lse is not None,
            num_warps=warps,
            **early,
        )
    return result(out, lse)


def _combine_config(rows: int, heads: int, value_dim: int, splits: int) -> tuple[int, int, int]:
    """DIM_TILE, SPLIT_TILE and warps of `combine_kernel`: small pieces to spread few rows over the device."""
    split_tile = triton.next_power_of_2(splits)
    in_registers = _VALUES_PER_WARP // split_tile
    if rows * heads < 128:
        dims, warps = min(32, in_registers), 1
    elif splits > 8:
        dims, warps = min(LATENT_TILE, in_registers), 1
    else:
        dims, warps = value_dim, 4
    return min(dims, value_dim & -value_dim), split_tile, warps  # a power of two that divides value_dim
