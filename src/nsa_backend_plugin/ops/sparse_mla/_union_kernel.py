"""Triton kernel of attention for groups of adjacent queries that share one gather, and the tiles that it runs with.

One program attends all heads of a group of 4 or 8 queries to the union of the rows that they select
(`_union_lists.py`). A gathered row serves every query of the group; the bits beside its slot say which queries own it,
and the scores of the others are masked. So each query's softmax is over its own rows alone, as exact as computed alone.

The list is read a tile ahead: a row's address then depends on no load of the same step, and the pipeliner keeps the
rows of the next tile in flight. The list is padded to whole tiles, so no load of a row needs a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from nsa_backend_plugin.ops._triton.mla_kernels import _LN2, _LOWEST


@dataclass(frozen=True)
class Tile:
    """One configuration of `union_kernel`.

    rows: query rows of a program, the heads of one query behind those of the last. keys: gathered rows of a step.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


#: The fastest that `tools/tune_union.py` tries where rows are shared (H200, 2026-11-27; with 32 keys and three stages
#: it takes 1.2 times as long). "cpu" is Triton's interpreter.
TILES = {"sm_90": Tile(64, 64, 8, 2), "cpu": Tile(64, 32, 8, 3)}
#: Queries of a group at most: the bits beside a slot.
MOST_QUERIES = 8


def group_size(heads: int, tile: Tile) -> int:
    """Queries of a group: a power of two, as many as their heads fit the tile; 0 where those of one do not."""
    return min(MOST_QUERIES, tile.rows // triton.next_power_of_2(heads))


@triton.jit(do_not_specialize=["tokens"])
def union_kernel(
    q,  # [tokens, HEADS, VALUE_DIM + ROPE_DIM]
    kv,  # [slots, VALUE_DIM + ROPE_DIM], rows of kv_stride elements
    lists,  # int32 [groups, list_stride]: slot << GROUP | owners, in whole tiles
    counts,  # int32 [groups] entries of each list; 0 where the queries of a group are computed alone
    out,  # [tokens, HEADS, VALUE_DIM]
    lse,  # fp32 [tokens, HEADS], written when WRITE_LSE
    score_scale,  # softmax scale * log2(e)
    kv_stride,
    list_stride,
    tokens,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_TILE: tl.constexpr,  # GROUP * HEADS and padding
    KEY_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,  # see early_launch.py
):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    group = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + group)
    if count == 0:
        return
    row = tl.arange(0, ROW_TILE)
    first_row = group * (GROUP * HEADS)
    row_exists = (row < GROUP * HEADS) & (first_row + row < tokens * HEADS)
    dim = tl.arange(0, VALUE_DIM)
    rope_dim = VALUE_DIM + tl.arange(0, ROPE_DIM)
    q_row = q + (first_row + row[:, None]) * (VALUE_DIM + ROPE_DIM)
    query = tl.load(q_row + dim[None, :], mask=row_exists[:, None], other=0.0)
    query_rope = tl.load(q_row + rope_dim[None, :], mask=row_exists[:, None], other=0.0)
    owner = 1 << (row // HEADS)  # of a row of padding a bit that no entry has, or that of a query that has no rows

    # Running softmax in base 2.
    accumulator = tl.zeros([ROW_TILE, VALUE_DIM], tl.float32)
    highest = tl.full([ROW_TILE], _LOWEST, tl.float32)
    total = tl.zeros([ROW_TILE], tl.float32)
    entries = lists + group * list_stride + tl.arange(0, KEY_TILE)
    entry = tl.load(entries)
    for start in tl.range(0, count, KEY_TILE, num_stages=STAGES):
        key_row = kv + (entry >> GROUP).to(tl.int64) * kv_stride
        value = tl.load(key_row[:, None] + dim[None, :])
        key_rope = tl.load(key_row[:, None] + rope_dim[None, :])
        next_entry = tl.load(entries + start + KEY_TILE, mask=start + KEY_TILE < count, other=0)

        # `count` is positive, which the compiler does not see. A product whose result flows straight into another one
        # gets all keys in every warp, so that both warp groups would compute all scores; a branch hides the other one.
        score = tl.zeros([ROW_TILE, KEY_TILE], tl.float32)
        if count > 0:
            score = tl.dot(query, tl.trans(value))
        score = tl.dot(query_rope, tl.trans(key_rope), score)
        score = tl.where((entry[None, :] & owner[:, None]) != 0, score * score_scale, float("-inf"))

        new_highest = tl.maximum(highest, tl.max(score, 1))
        decay = tl.exp2(highest - new_highest)
        weight = tl.exp2(score - new_highest[:, None])
        highest = new_highest
        total = total * decay + tl.sum(weight, 1)
        accumulator = tl.dot(weight.to(value.dtype), value, accumulator * decay[:, None])
        entry = next_entry

    # A query without a row: total is 0 and its accumulator is 0.
    result = accumulator * (1.0 / tl.maximum(total, 1e-30))[:, None]
    target = out + (first_row + row[:, None]) * VALUE_DIM + dim[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=row_exists[:, None])
    if WRITE_LSE:
        row_lse = tl.where(total > 0, highest * _LN2 + tl.log(total), float("-inf"))
        tl.store(lse + first_row + row, row_lse, mask=row_exists)
