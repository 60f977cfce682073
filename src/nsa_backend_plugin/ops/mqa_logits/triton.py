"""Weighted MQA logits in Triton: paged (decode) and ragged (prefill), for CUDA and ROCm (compile-checked, not run).

One tile is S^T = K Q^T: keys fill the rows of the MMA, the heads of one or several queries its columns. The sum over
heads then stays within a row, and a garbage key (in the last page, past a row's length) can reach only its own row,
which is never stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nsa_backend_plugin.ops._torch.logits import row_lengths
from nsa_backend_plugin.ops._triton import early_launch, support
from nsa_backend_plugin.ops._triton.early_launch import await_predecessor
from nsa_backend_plugin.ops._triton.index_pages import scale_offset, value_offsets
from nsa_backend_plugin.ops._triton.launch import launch
from nsa_backend_plugin.ops.arch import core_count, is_cuda, is_rocm
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.mqa_logits import Paged, Ragged

MAX_HEADS = 128
_PAGED_TILE = 64
_FILL_BLOCK = 1024
_WARP_GROUP_MMA = ("sm_90", "sm_100", "sm_103")  # fp8 operands come from shared memory


def available(arch: str) -> Reason:
    return support.available(arch) or (None if support.has_e4m3(arch) else f"{arch} has no e4m3 arithmetic")


@triton.jit
def _load_queries(q, weights, first_row, rows, heads, D: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr):
    """q [QUERIES*HEADS, D] and weights [QUERIES*HEADS] of `rows` query rows; padding queries and heads are zero."""
    column = tl.arange(0, QUERIES * HEADS)
    query, head = column // HEADS, column % HEADS
    keep = (query < rows) & (head < heads)
    source = (first_row + query).to(tl.int64) * heads + head
    values = tl.load(q + source[:, None] * D + tl.arange(0, D)[None, :], mask=keep[:, None], other=0.0)
    return values, tl.load(weights + source, mask=keep, other=0.0)


@triton.jit
def _tile_logits(k, q, weights, k_scale, TILE: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr):
    """k [TILE, D], q [QUERIES*HEADS, D], weights [QUERIES*HEADS], k_scale [TILE] -> logits [TILE, QUERIES]."""
    dots = tl.dot(k, tl.trans(q))
    weighted = tl.maximum(dots, 0.0) * weights[None, :]
    return tl.sum(tl.reshape(weighted, (TILE, QUERIES, HEADS)), axis=2) * k_scale[:, None]


@triton.jit
def _load_in_memory_order(tile_begin, TILE: tl.constexpr, D: tl.constexpr):
    """Keys [TILE, D] of a preshuffled page: one contiguous load, then a transposition of the 16-byte groups."""
    groups = tl.reshape(tl.load(tile_begin + tl.arange(0, TILE * D)), (TILE // 16, D // 16, 16, 16))
    return tl.reshape(tl.permute(groups, (0, 2, 1, 3)), (TILE, D))


@triton.jit
def _paged_kernel(
    q,
    cache,
    cache_scale,
    weights,
    context_lens,
    block_table,
    out,
    batch,
    heads,
    table_stride,
    out_stride,
    NEXT_N: tl.constexpr,
    LENS_PER_QUERY: tl.constexpr,
    PRESHUFFLED: tl.constexpr,
    LINEAR: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    BATCH: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs share the batch's tiles evenly, whatever the lengths: program i of n takes the i-th n-th of them.

    So the grid depends on neither the lengths nor the widest context, and a captured graph stays balanced.
    """
    await_predecessor(EARLY)
    PAGE_BYTES: tl.constexpr = PAGE_SIZE * (D + 4)
    request = tl.arange(0, BATCH)
    exists = request < batch
    longest = tl.zeros((BATCH,), tl.int32)
    if LENS_PER_QUERY:
        for n in tl.static_range(NEXT_N):
            longest = tl.maximum(longest, tl.load(context_lens + request * NEXT_N + n, mask=exists, other=0))
    else:
        longest = tl.load(context_lens + request, mask=exists, other=0)
    tiles = (tl.maximum(longest, 0) + TILE - 1) // TILE
    tiles_up_to = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    share = (total + tl.num_programs(0) - 1) // tl.num_programs(0)
    tile = tl.program_id(0) * share
    last = tl.minimum(tile + share, total)

    first_query = tl.program_id(1) * QUERIES
    queries = tl.minimum(NEXT_N - first_query, QUERIES)
    j = tl.arange(0, QUERIES)
    token = tl.arange(0, TILE)
    in_tile = value_offsets(token, PRESHUFFLED)

    while tile < last:
        row = tl.sum((tiles_up_to <= tile).to(tl.int32), 0)
        row_begin = tl.sum(tl.where(request < row, tiles, 0), 0)
        row_end = row_begin + tl.sum(tl.where(request == row, tiles, 0), 0)
        stop = tl.minimum(last, row_end)
        q_row = row * NEXT_N + first_query
        values, weight = _load_queries(q, weights, q_row, queries, heads, D, QUERIES, HEADS)
        if LENS_PER_QUERY:
            visible = tl.load(context_lens + q_row + j, mask=j < queries, other=0)
        else:
            visible = tl.load(context_lens + row) - (NEXT_N - 1 - first_query - j)
            visible = tl.where(j < queries, visible, 0)
        out_row = out + (q_row + j).to(tl.int64) * out_stride
        table = block_table + row.to(tl.int64) * table_stride

        first = tile - row_begin
        end = stop - row_begin
        page = tl.load(table + first * TILE // PAGE_SIZE)
        # num_stages on the loop pipelines the scales as well, which the dot's operands alone would leave synchronous.
        for i in tl.range(first, end, num_stages=STAGES):
            # The next page number is fetched a tile ahead: the keys' address must not wait for it.
            next_page = tl.load(table + tl.minimum(i + 1, end - 1) * TILE // PAGE_SIZE)
            in_page = i * TILE % PAGE_SIZE
            page_begin = cache + page.to(tl.int64) * PAGE_BYTES
            tile_begin = page_begin + in_page * D
            k = _load_in_memory_order(tile_begin, TILE, D) if LINEAR else tl.load(tile_begin + in_tile)
            scale = cache_scale + page.to(tl.int64) * (PAGE_BYTES // 4) + scale_offset(0, PAGE_SIZE, D) // 4
            k_scale = tl.load(scale + in_page + token)
            logits = _tile_logits(k, values, weight, k_scale, TILE, QUERIES, HEADS)
            position = i * TILE + token
            inside = position[:, None] < visible[None, :]
            tl.store(out_row[None, :] + position[:, None], logits, mask=inside)
            page = next_page
        tile = stop


@triton.jit
def _ragged_kernel(
    q,
    k,
    k_scale,
    weights,
    row_start,
    row_end,
    out,
    tokens,
    keys,
    heads,
    out_stride,
    tiles_per_program,
    D: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: QUERIES rows against the part of a stretch of tiles that any of its rows sees."""
    first_row = tl.program_id(0) * QUERIES
    rows = tl.minimum(tokens - first_row, QUERIES)
    j = tl.arange(0, QUERIES)
    start = tl.load(row_start + first_row + j, mask=j < rows, other=0)
    end = tl.load(row_end + first_row + j, mask=j < rows, other=0)
    sees = start < end
    first = tl.min(tl.where(sees, start, keys), 0) // TILE
    stop = (tl.max(tl.where(sees, end, 0), 0) + TILE - 1) // TILE
    first = tl.maximum(first, tl.program_id(1) * tiles_per_program)
    stop = tl.minimum(stop, (tl.program_id(1) + 1) * tiles_per_program)

    values, weight = _load_queries(q, weights, first_row, rows, heads, D, QUERIES, HEADS)
    out_row = out + (first_row + j).to(tl.int64) * out_stride
    token = tl.arange(0, TILE)
    dim = tl.arange(0, D)
    for i in tl.range(first, stop, num_stages=STAGES):
        position = i * TILE + token
        exists = position < keys
        tile = tl.load(k + position.to(tl.int64)[:, None] * D + dim[None, :], mask=exists[:, None], other=0.0)
        scale = tl.load(k_scale + position, mask=exists, other=0.0)
        logits = _tile_logits(tile, values, weight, scale, TILE, QUERIES, HEADS)
        inside = (position[:, None] >= start[None, :]) & (position[:, None] < end[None, :])
        tl.store(out_row[None, :] + position[:, None], logits, mask=inside)


@triton.jit
def _fill_outside_kernel(out, row_start, row_end, columns, out_stride, HAS_START: tl.constexpr, BLOCK: tl.constexpr):
    """Write -inf into every column of a row outside [row_start, row_end)."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    outside = column >= tl.load(row_end + row)
    if HAS_START:
        outside = outside | (column < tl.load(row_start + row))
    target = out + row.to(tl.int64) * out_stride + column
    tl.store(target, tl.full((BLOCK,), float("-inf"), tl.float32), mask=outside & (column < columns))


@dataclass(frozen=True)
class _Config:
    tile: int  # keys per step
    queries: int  # query rows that share one read of the keys
    heads: int  # padded to a power of two, at least 16
    num_warps: int
    num_stages: int
    programs_per_core: int  # resident at once, so that one wave does all the work
    registers: int | None = None  # a lane may use, where the compiler alone would take too many for that

    @property
    def options(self) -> dict[str, int]:
        return {"maxnreg": self.registers} if self.registers else {}


def _query_tile(queries: int, heads: int, widest: int) -> tuple[int, int]:
    """(queries, heads) of a tile that has at most `widest` accumulator columns, or one query."""
    padded = max(16, triton.next_power_of_2(heads))
    return min(triton.next_power_of_2(queries), max(1, widest // padded)), padded


def _ragged_config(arch: str, rows: int, heads: int) -> _Config:
    share, padded = _query_tile(rows, heads, 128)
    return _Config(128, share, padded, 8 if share * padded > 64 else 4, 3 if is_cuda(arch) else 2, 1)


def _paged_config(arch: str, next_n: int, heads: int, batch: int, page_size: int) -> _Config:
    # 256 columns fill the registers of 8 CUDA warps at 64 keys; AMD also keeps the queries in registers.
    share, padded = _query_tile(next_n, heads, 256 if is_cuda(arch) else 128)
    columns = share * padded
    tile = min(_PAGED_TILE, page_size & -page_size)
    if not is_cuda(arch):
        return _Config(tile, share, padded, 4, 2, 2)
    # mma.sync (sm_89, sm_120) has its operands in registers: 4 warps spill at 64 columns, though not at 128.
    eight = columns > 128 or (columns == 64 and arch not in _WARP_GROUP_MMA)
    num_warps = 8 if eight else 4
    return _Config(tile, share, padded, num_warps, 3, *_residents(arch, columns, num_warps, batch))


def _residents(arch: str, columns: int, num_warps: int, batch: int) -> tuple[int, int | None]:
    """Programs that a CUDA core holds at once, and the registers that each lane may use for that.

    More of them are worth some spilled bytes: 64 requests of 8k took 25.0 us instead of 35.2 with 128 columns, 42.9
    instead of 58.1 with 256 (one H200, 2026-11-28).
    """
    if batch > 256:  # whose tile counts take registers, too
        return (1 if num_warps == 8 else 2), None
    if arch == "sm_90" or (columns <= 64 and arch in _WARP_GROUP_MMA):
        return 16 // num_warps, 128
    return (1 if columns > 128 else 2), None


def _loads_in_memory_order(arch: str) -> bool:
    """Whether preshuffled tiles are loaded as they lie. Transposing spills on sm_89; AMD is not measured."""
    return not is_rocm(arch) and arch != "sm_89"


def _max_batch(arch: str) -> int:
    """Every paged program holds the tile counts of the whole batch in registers, of which RDNA has half as many."""
    return 2048 if is_rocm(arch) and not arch.startswith("gfx9") else 4096


def declines_paged(call: Paged) -> Reason:
    batch, _, heads, _ = call.q.shape
    if batch > _max_batch(call.arch):
        return f"batch {batch}: at most {_max_batch(call.arch)}"
    return _declines(heads, q=call.q, cache=call.cache)


def declines_ragged(call: Ragged) -> Reason:
    return _declines(call.q.shape[1], q=call.q, k=call.k)


def _declines(heads: int, **tensors: torch.Tensor) -> Reason:
    if heads > MAX_HEADS:
        return f"{heads} heads: at most {MAX_HEADS}"
    for name, tensor in tensors.items():
        if tensor.data_ptr() % 16:
            return f"{name} does not start at a 16-byte boundary"
    return None


def paged(call: Paged) -> torch.Tensor:
    batch, next_n, heads, dim = call.q.shape
    out = call.output()
    if batch * next_n == 0:
        return out
    config = _paged_config(call.arch, next_n, heads, batch, call.page_size)
    groups = triton.cdiv(next_n, config.queries)
    programs = max(1, core_count(out.device) * config.programs_per_core // groups)
    launch(
        _paged_kernel,
        (programs, groups),
        call.q,
        call.cache.view(call.q.dtype),
        call.cache.view(torch.float32),
        call.weights.contiguous(),
        call.context_lens.contiguous(),
        call.block_table,
        out,
        batch,
        heads,
        call.block_table.stride(0),
        out.stride(0),
        NEXT_N=next_n,
        LENS_PER_QUERY=call.context_lens.dim() == 2,
        PRESHUFFLED=call.layout == "preshuffled",
        LINEAR=call.layout == "preshuffled" and _loads_in_memory_order(call.arch),
        PAGE_SIZE=call.page_size,
        D=dim,
        TILE=config.tile,
        QUERIES=config.queries,
        HEADS=config.heads,
        BATCH=triton.next_power_of_2(batch),
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        resident=config.programs_per_core,
        **config.options,
        **early_launch.options(call.arch),
    )
    if call.clean:
        _fill_outside(out, None, row_lengths(call.context_lens, next_n).reshape(-1))
    return out


def ragged(call: Ragged) -> torch.Tensor:
    tokens, heads, dim = call.q.shape
    keys = call.k.shape[0]
    out = call.output()
    if tokens * keys == 0:
        return out
    config = _ragged_config(call.arch, tokens, heads)
    blocks = triton.cdiv(tokens, config.queries)
    tiles = triton.cdiv(keys, config.tile)
    splits = max(1, min(tiles, core_count(out.device) * config.programs_per_core // blocks))
    tiles_per_program = triton.cdiv(tiles, splits)
    start, end = call.row_start.contiguous(), call.row_end.contiguous()
    launch(
        _ragged_kernel,
        (blocks, triton.cdiv(tiles, tiles_per_program)),
        call.q,
        call.k,
        call.k_scale.contiguous(),
        call.weights.contiguous(),
        start,
        end,
        out,
        tokens,
        keys,
        heads,
        out.stride(0),
        tiles_per_program,
        D=dim,
        TILE=config.tile,
        QUERIES=config.queries,
        HEADS=config.heads,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        resident=config.programs_per_core,
    )
    if call.clean:
        _fill_outside(out, start, end)
    return out


def _fill_outside(out: torch.Tensor, row_start: torch.Tensor | None, row_end: torch.Tensor) -> None:
    rows, columns = out.shape
    launch(
        _fill_outside_kernel,
        (rows, triton.cdiv(columns, _FILL_BLOCK)),
        out,
        row_start,
        row_end,
        columns,
        out.stride(0),
        HAS_START=row_start is not None,
        BLOCK=_FILL_BLOCK,
    )
