"""Sparse MLA prefill with few heads: adjacent queries share one gather of the rows that they select.

Neighbours in a prompt select nearly the same rows (examples/tiny_dsa/README.md has how many), and few heads leave a
matrix unit's 64 rows empty. Groups of 2, 4 or 8 queries, whose heads fill those rows, are attended to the union of
their rows (`_union_kernel.py`), which the device finds (`_union_lists.py`). A group whose union is too large to pay is
computed as it would be without this file. The device decides: nothing waits for it, and a graph captures it.

A query's result is that of its own rows, but for the order of the sums, which depends on its neighbours. A row that is
not finite spoils the queries of its group, also those that do not select it: 0 times infinity is no number.

Packed rows are unpacked to bf16 once for all queries of a context: widened for every group, they would take longer
than the CUDA kernel does without sharing. Scratch beside that copy: the lists, smaller than `indices`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nsa_backend_plugin.layouts import LATENT_DIM, ROPE_DIM
from nsa_backend_plugin.ops._cuda import mla as cuda_mla
from nsa_backend_plugin.ops._torch.mla import Result, result
from nsa_backend_plugin.ops._triton import early_launch
from nsa_backend_plugin.ops._triton.launch import launch
from nsa_backend_plugin.ops._triton.mla_launch import LOG2_E
from nsa_backend_plugin.ops._triton.support import available as triton_available
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.sparse_mla import Attend, _context, _union_kernel, _union_lists, cuda, triton

#: Share of a group's slots, in percent, up to which their union is attended at once instead of each query alone. By
#: estimate from the times of benchmarks/RESULTS.md, not measured: a step of the shared kernel over 64 rows against one
#: of Triton's over bf16 rows and of the CUDA kernel over packed rows, which is faster.
MOST_PERCENT = {"bf16": 75, "packed": 50}
#: Slots of a context for each query, up to which unpacking it costs a few percent of attending. By estimate: about 1 ns
#: a slot, against some 380 ns that the CUDA kernel takes for a query.
MOST_CONTEXT_PER_QUERY = 16


def available(arch: str) -> Reason:
    if arch not in _union_kernel.TILES:
        return f"queries share rows on {', '.join(sorted(_union_kernel.TILES.keys() - {'cpu'}))}, not {arch}"
    return triton_available(arch) if arch == "cpu" else _union_lists.available(arch) or cuda.available(arch)


def declines_attend(call: Attend) -> Reason:
    tokens, heads, query_dim = call.q.shape
    if call.kind == "fp8":
        return "kv is plain fp8: only bf16 and packed rows"
    if (call.value_dim, query_dim) != (LATENT_DIM, LATENT_DIM + ROPE_DIM):
        return f"value_dim {call.value_dim} of {query_dim}: only {LATENT_DIM} of {LATENT_DIM + ROPE_DIM}"
    group = _union_kernel.group_size(heads, _union_kernel.TILES[call.arch])
    if group == 1:
        return f"{heads} heads: those of two queries do not fit a tile"
    if call.indices.shape[1] > _union_lists.MOST_SLOTS_OF_A_QUERY:
        return f"top-k {call.indices.shape[1]}: at most {_union_lists.MOST_SLOTS_OF_A_QUERY}"
    if call.kv.shape[0] > _union_lists.most_slots(group):
        return f"a cache of {call.kv.shape[0]} slots: at most {_union_lists.most_slots(group)} beside the owners' bits"
    if call.kind == "packed":
        reason = _context.declines(call)
        if reason is not None:
            return reason
        assert call.context is not None
        if call.context.shape[0] > MOST_CONTEXT_PER_QUERY * tokens:
            return f"a context of {call.context.shape[0]} slots for {tokens} queries: unpacking it would not pay"
    return cuda.declines_attend(call) if _alone_in_cuda(call) else triton.declines_attend(call)


def attend(call: Attend) -> Result:
    tokens, heads, _ = call.q.shape
    call = replace(call, out=call.output())
    if tokens == 0:
        return triton.attend(call)
    tile = _union_kernel.TILES[call.arch]
    group = _union_kernel.group_size(heads, tile)
    kv, places = (call.kv, None) if call.kind != "packed" else _context.unpacked(call)
    lists = _union_lists.build(
        call.arch,
        call.indices,
        call.lengths,
        places,
        group=group,
        tile=tile.keys,
        most_percent=MOST_PERCENT[call.kind],
    )
    out, lse = _alone(call, lists.alone)
    launch(
        _union_kernel.union_kernel,
        (lists.counts.shape[0],),
        call.q,
        kv,
        lists.entries,
        lists.counts,
        out,
        out if lse is None else lse,
        call.softmax_scale * LOG2_E,
        kv.stride(0),
        lists.entries.stride(0),
        tokens,
        **_union_kernel.constexprs(heads, group, tile, lse is not None),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **early_launch.options(call.arch),
    )
    return result(out, lse)


def _alone_in_cuda(call: Attend) -> bool:
    """Whether the CUDA kernel computes the queries that share nothing; in the interpreter it cannot."""
    return call.kind == "packed" and call.arch != "cpu"


def _alone(call: Attend, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) of the queries that share nothing. lengths: [T] int32, -1 of the others, which get any result."""
    if _alone_in_cuda(call):
        keys, leading = call.indices.shape[1], call.lengths is not None
        done = cuda_mla.attend(call, cuda.CONFIGS, call.indices, lengths, keys, leading=leading)
    else:
        done = triton.attend(replace(call, lengths=lengths))
    return done if isinstance(done, tuple) else (done, None)
