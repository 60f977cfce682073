"""FlashInfer's paged MLA decode (fa3 on Hopper, fa2 elsewhere), bf16, any page size and head count.

Its `plan` reads the lengths on the host: the first call of a step waits for the device. Inside a CUDA graph it
declines.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from nsa_backend_plugin.layouts import ROPE_DIM
from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops._vendor import flashinfer, mla
from nsa_backend_plugin.ops.arch import is_cuda
from nsa_backend_plugin.ops.call import Reason, capturing
from nsa_backend_plugin.ops.dense_mla import Decode

_WORKSPACE_BYTES = 128 << 20  # what its documentation asks for


def available(arch: str) -> Reason:
    if not is_cuda(arch):
        return f"FlashInfer needs an NVIDIA GPU, not {arch}"
    if int(arch[3:]) < 80:
        return f"FlashInfer needs sm_80 or newer, not {arch}"
    return flashinfer.missing("flashinfer.mla", "BatchMLAPagedAttentionWrapper")


def declines_decode(call: Decode) -> Reason:
    if capturing(call.q.device):
        return "plan reads the lengths on the host, which a CUDA graph cannot capture"
    if call.num_kv_splits is not None:
        return "num_kv_splits is given: its plan chooses the splits"
    return mla.unquantized_limits(call, call.page_size)


def decode(call: Decode) -> Result:
    q, value_dim, page_size = call.q, call.value_dim, call.page_size
    key = ("flashinfer", q.shape[1], page_size, call.softmax_scale)
    wrapper = call.step.once(key, lambda: _planned(call), call.block_table, call.seq_lens)
    pages = call.kv.view(-1, page_size, call.kv.shape[-1])
    result = wrapper.run(
        q[..., :value_dim].contiguous(),
        q[..., value_dim:].contiguous(),
        pages[..., :value_dim],
        pages[..., value_dim:],
        return_lse=call.return_lse,
    )
    out, lse = result if call.return_lse else (result, None)
    return mla.finish(call, out, lse, mla.no_length(call, call.seq_lens), mla.BASE_2)


def _planned(call: Decode) -> Any:
    """A wrapper of its own: it holds the plan."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    device, batch, page_size = call.q.device, call.q.shape[0], call.page_size
    lengths = call.seq_lens.cpu()
    page_counts = (lengths + page_size - 1) // page_size
    page_starts = torch.zeros(batch + 1, dtype=torch.int32)
    page_starts[1:] = page_counts.cumsum(0)
    used = torch.arange(call.block_table.shape[1])[None, :] < page_counts[:, None]
    wrapper = BatchMLAPagedAttentionWrapper(_workspace(device), backend="fa3" if call.arch == "sm_90" else "fa2")
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32),
        page_starts,
        call.block_table[used.to(device)],
        lengths,
        call.q.shape[1],
        call.value_dim,
        ROPE_DIM,
        page_size,
        True,
        call.softmax_scale,
        call.q.dtype,
        call.kv.dtype,
    )
    return wrapper


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
