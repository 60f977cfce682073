"""CUTLASS MLA decode (sgl_kernel) on sm_100, bf16; sgl_kernel pads the heads to 128."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops._vendor import mla, probe
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.dense_mla import Decode

_ARCHS = ("sm_100", "sm_103")
_TILE = 128  # tokens; a row of the page table covers a whole number of tiles


def available(arch: str) -> Reason:
    if arch not in _ARCHS:
        return f"CUTLASS MLA needs {' or '.join(_ARCHS)}, not {arch}"
    return probe.missing("sgl_kernel", "cutlass_mla_decode", "cutlass_mla_get_workspace_size")


def declines_decode(call: Decode) -> Reason:
    if call.return_lse:
        return "return_lse: it has no log-sum-exp"
    pages = call.block_table.shape[1]
    if pages == 0 or pages * call.page_size % _TILE:
        return f"block_table of {pages} pages of {call.page_size}: only whole tiles of {_TILE} tokens"
    if not call.block_table.is_contiguous():
        return f"block_table has strides {call.block_table.stride()}: only contiguous"
    return mla.unquantized_limits(call, call.page_size)


def decode(call: Decode) -> Result:
    from sgl_kernel import cutlass_mla_decode, cutlass_mla_get_workspace_size

    q, kv, page_size = call.q, call.kv, call.page_size
    splits = call.num_kv_splits or 1  # more than one is not safe in a CUDA graph, says sgl_kernel
    context = call.block_table.shape[1] * page_size
    needed = cutlass_mla_get_workspace_size(context, q.shape[0], num_kv_splits=splits)
    out = cutlass_mla_decode(
        q[..., : call.value_dim],
        q[..., call.value_dim :],
        kv.view(-1, page_size, kv.shape[-1]),
        call.seq_lens,
        call.block_table,
        torch.empty(needed, dtype=torch.uint8, device=q.device),
        call.softmax_scale,
        splits,
    )
    return mla.finish(call, out, None, mla.no_length(call, call.seq_lens))
