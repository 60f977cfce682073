"""Sparse MLA prefill with few heads: adjacent queries share one gather of the rows that they select.

Neighbours in a prompt select nearly the same rows (examples/tiny_dsa/README.md has how many), and few heads leave a
matrix unit's 64 rows empty. Groups of 4 or 8 queries, whose heads fill those rows, are attended to the union of
their rows (`_union_kernel.py`), which the device finds (`_union_lists.py`). A group whose union is too large to pay is
computed as it would be without this file. The device decides: nothing waits for it, and a graph captures it.

A query's result is that of its own rows, but for the order of the sums, which depends on its neighbours. A row that is
not finite spoils the queries of its group, also those that do not select it: 0 times infinity is no number.

Over bf16 rows alone: over packed ones the CUDA kernel is faster without sharing, but where eight queries share nearly
everything (`python -m tools.tune_union`, H200, 2026-11-27, commit 0edb6ae). Scratch: the lists, smaller than `indices`.
"""

from __future__ import annotations

from dataclasses import replace

from nsa_backend_plugin.layouts import LATENT_DIM, ROPE_DIM
from nsa_backend_plugin.ops._torch.mla import Result, result
from nsa_backend_plugin.ops._triton import early_launch
from nsa_backend_plugin.ops._triton.launch import launch
from nsa_backend_plugin.ops._triton.mla_launch import LOG2_E
from nsa_backend_plugin.ops._triton.support import available as triton_available
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.sparse_mla import Attend, _union_kernel, _union_lists, triton

#: By the queries of a group, the share of their slots, in percent, up to which the union is attended at once instead of
#: each query alone. Both take the same time at 46 to 49 and at 38 to 55 (benchmarks/results/tuning/union-h200.json).
MOST_PERCENT = {4: 45, 8: 38}


def available(arch: str) -> Reason:
    if arch not in _union_kernel.TILES:
        return f"queries share rows on {', '.join(sorted(_union_kernel.TILES.keys() - {'cpu'}))}, not {arch}"
    return triton_available(arch) if arch == "cpu" else _union_lists.available(arch)


def declines_attend(call: Attend) -> Reason:
    _, heads, query_dim = call.q.shape
    if call.kind != "bf16":
        return f"kv is {call.kind}: only bf16 rows"
    if (call.value_dim, query_dim) != (LATENT_DIM, LATENT_DIM + ROPE_DIM):
        return f"value_dim {call.value_dim} of {query_dim}: only {LATENT_DIM} of {LATENT_DIM + ROPE_DIM}"
    group = _union_kernel.group_size(heads, _union_kernel.TILES[call.arch])
    if group not in MOST_PERCENT:
        return f"{heads} heads: those of four queries do not fit a tile"
    if call.indices.shape[1] > _union_lists.MOST_SLOTS_OF_A_QUERY:
        return f"top-k {call.indices.shape[1]}: at most {_union_lists.MOST_SLOTS_OF_A_QUERY}"
    if call.kv.shape[0] > _union_lists.most_slots(group):
        return f"a cache of {call.kv.shape[0]} slots: at most {_union_lists.most_slots(group)} beside the owners' bits"
    return triton.declines_attend(call)


def attend(call: Attend) -> Result:
    tokens, heads, _ = call.q.shape
    call = replace(call, out=call.output())
    if tokens == 0:
        return triton.attend(call)
    tile = _union_kernel.TILES[call.arch]
    group = _union_kernel.group_size(heads, tile)
    lists = _union_lists.build(
        call.arch, call.indices, call.lengths, group=group, tile=tile.keys, most_percent=MOST_PERCENT[group]
    )
    alone = triton.attend(replace(call, lengths=lists.alone))  # what it gives the others is overwritten
    out, lse = alone if isinstance(alone, tuple) else (alone, None)
    launch(
        _union_kernel.union_kernel,
        (lists.counts.shape[0],),
        call.q,
        call.kv,
        lists.entries,
        lists.counts,
        out,
        out if lse is None else lse,
        call.softmax_scale * LOG2_E,
        call.kv.stride(0),
        lists.entries.stride(0),
        tokens,
        HEADS=heads,
        VALUE_DIM=LATENT_DIM,
        ROPE_DIM=ROPE_DIM,
        WRITE_LSE=lse is not None,
        GROUP=group,
        ROW_TILE=tile.rows,
        KEY_TILE=tile.keys,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **early_launch.options(call.arch),
    )
    return result(out, lse)
